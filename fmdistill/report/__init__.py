"""The report stage: runs -> one self-contained HTML page of tables, curves and pictures, or the tables as text."""

from pathlib import Path

from fmdistill.evaluate.results import Result
from fmdistill.files import check_folder, write_whole
from fmdistill.logs import log
from fmdistill.registry import UserError
from fmdistill.report import examples, labels, page, plots, ranked, rows, tables
from fmdistill.report.rows import Run

ONE_SEED = (
    "One seed is not a comparison: two seeds of one recipe can differ as much as these rows do, so a difference counts "
    "only if it holds over several seeds."
)
ABOUT_PUBLISHED = (
    "Shaded rows are a paper's, with another teacher, other images and a larger student: compare differences with "
    "them, not values."
)
ABOUT_CURVES = (
    "Each panel is one logged quantity, with a line per run. A weighted and an unweighted loss are different "
    "quantities: compare runs by the table, and a run's curve only with itself. The effective sample size is "
    "(Σw)²/(N Σw²); it is 1 if all patches or images have the same weight."
)
ABOUT_WEIGHTS = (
    "The weight of every patch in the loss, as in training, over the grey image: red patches count more than the "
    "average patch, blue ones less, white ones exactly as much; each image has its own scale. SRW gives high weights "
    "to patches whose teacher embedding is unlike the rest of its image. N·w is a weight relative to the mean."
)
ABOUT_IMAGE_WEIGHTS = (
    "The weight of whole images in the loss, computed with the validation images as one batch. SRW gives high weights "
    "to images whose teacher embedding is unlike the others'. N·w is a weight relative to the mean."
)
ABOUT_MASKS = {
    "typical": (
        "Typical masks",
        "One point per image, the same for every network, and each network's mask with its highest predicted IoU. Of "
        "the points of a 10×10 grid whose teacher mask covers 3 to 30 % of the image, it is the one of median "
        "agreement between students and teacher.",
    ),
    "worst": (
        "Worst masks",
        "Of the same points, the one at which the students agree least with the teacher.",
    ),
}
ABOUT_LABELS = (
    "Validation images with each network's best label: first images on which student and teacher agree, then images "
    "on which they do not, each evenly spread over the images judged."
)


def run(runs: list[str], out: str, trust: bool = False) -> Path:
    """Write a report on the run folders to `out`/index.html and return that path.

    Pictures need the runs' students; a student whose code is outside fmdistill is imported only with `trust`.
    """
    check_folder(out, "the report")
    loaded = rows.read_runs(runs)
    first, last = _pictures(loaded, trust)
    parts = [_titles(loaded), *first, *_tables(loaded), *_curves(loaded), *last]
    path = Path(out).expanduser() / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.page("Distillation report", parts))
    return path


def text(runs: list[str]) -> str:
    """Return the tables of the run folders as text for a terminal, with a warning about single seeds."""
    texts = [f"{protocol}\n{tables.plain(table)}" for protocol, _, table in _results(rows.read_runs(runs))]
    return "\n\n".join([*(texts or ["no evaluation yet: run `fmdistill evaluate PROTOCOL RUN`"]), ONE_SEED])


def _results(runs: list[Run]) -> list[tuple[str, Result, tables.Table]]:
    """Return each protocol's name, a result of it, which describes its metrics, and its table."""
    results = {stem: result for run in runs for stem, result in run.evaluations.items()}
    return [
        (stem, result, tables.build(rows.rows(runs, stem), result.metrics, rows.published(result.protocol)))
        for stem, result in results.items()
    ]


def _titles(runs: list[Run]) -> str:
    return page.definitions(
        (run.name, f"{run.recipe.title or 'untitled recipe'} · seed {run.recipe.seed}") for run in runs
    )


def _tables(runs: list[Run]) -> list[str]:
    parts = [page.heading("Results"), page.paragraph(ONE_SEED, "notice")]
    results = _results(runs)
    if not results:
        text = "None of these runs has been evaluated yet: run fmdistill evaluate PROTOCOL RUN."
        return [*parts, page.paragraph(text)]
    for protocol, _, table in results:
        parts += [page.heading(f"Protocol {protocol}", 3), tables.html(table)]
    sentences = [text for _, result, table in results for text in _explanations(result, table)]
    if any(section.kind == "published" for _, _, table in results for section in table.sections):
        sentences.append(ABOUT_PUBLISHED)
    return [*parts, page.paragraph(" ".join(dict.fromkeys(sentences)))]


def _explanations(result: Result, table: tables.Table) -> list[str]:
    """Return the evaluator's explanations of the metrics and dimensions that the table shows."""
    metrics = dict.fromkeys(column.key[0] for column in table.columns)
    dimensions = dict.fromkeys(name for column in table.columns for name, _ in column.key[1])
    texts = [*(result.metric(name).help for name in metrics), *(result.dimensions.get(name, "") for name in dimensions)]
    return [text for text in texts if text]


def _curves(runs: list[Run]) -> list[str]:
    picture = plots.curves_figure({run.name: run.log for run in runs})
    if picture is None:
        return []
    caption = "Training logs. An axis is logarithmic if its loss or norm spans more than a factor of five."
    figure = page.figure(picture, caption, "Loss curves, one line per run", wide=True)
    return [page.heading("Training"), page.paragraph(ABOUT_CURVES), figure]


def _pictures(runs: list[Run], trust: bool) -> tuple[list[str], list[str]]:
    """Return the pictures of what the networks answer, which open the page, and those of weights, which end it."""
    try:
        shown, stride = examples.gather(runs, trust=trust)
        by_image = ranked.gather(runs, trust=trust)
        labelled = labels.gather(runs)
    except UserError as error:
        log.warning("report: no pictures: %s", error)
        return [], [page.heading("Pictures"), page.paragraph(f"No pictures: {error}", "notice")]
    return [*_masks(shown), *_labels(labelled)], [*_weight_maps(shown, stride), *_weighed_images(by_image)]


def _weight_maps(shown: list[examples.Example], stride: int) -> list[str]:
    figures = []
    for example in shown:
        for name, weight in example.weights.items():
            inside = weight[example.valid]
            picture = plots.weight_map_figure(example.image, weight, example.valid, stride)
            caption = (
                f"{example.group}, {example.key}: weights of {name}, N·w from {inside.min():.2f} to {inside.max():.2f} "
                f"over the {example.valid.sum()} patches that are not padding (of {example.valid.size})."
            )
            figures.append(page.figure(picture, caption, f"Weight map of {example.key}"))
    if not figures:
        return []
    return [page.heading("Weights of patches"), page.paragraph(ABOUT_WEIGHTS), page.grid(figures)]


def _weighed_images(by_image: list[ranked.Ranked]) -> list[str]:
    figures = []
    for entry in by_image:
        picture = plots.strip_figure(entry.images, [f"{weight:.2f}" for weight in entry.weights])
        caption = f"N·w of {entry.name}: of {entry.weighed} images those with the largest weights, then the smallest."
        figures.append(page.figure(picture, caption, f"Images by their weight, {entry.name}", wide=True))
    if not figures:
        return []
    return [page.heading("Weights of images"), page.paragraph(ABOUT_IMAGE_WEIGHTS), *figures]


def _masks(shown: list[examples.Example]) -> list[str]:
    key = page.colour_key(
        (
            (plots.AGREED, "in both masks"),
            (plots.MISSED, "teacher only (missed)"),
            (plots.ADDED, "student only (added)"),
        )
    )
    parts = []
    for kind, (heading, about) in ABOUT_MASKS.items():
        figures = []
        for example in (example for example in shown if kind in example.prompts):
            prompt = example.prompts[kind]
            share = 100 * prompt.masks["teacher"].mean()
            caption = f"{example.group}, {example.key}: the teacher's mask covers {share:.0f} % of the image."
            picture = plots.mask_figure(example.image, prompt.point, prompt.masks)
            figures.append(page.figure(picture, caption, f"Masks of teacher and students on {example.key}", wide=True))
        if figures:
            parts += [page.heading(heading), page.paragraph(about), key, *figures]
    return parts


def _labels(labelled: list[labels.Labelled]) -> list[str]:
    if not labelled:
        return []
    figures = [
        page.figure(plots.labels_figure(entry.image, entry.answers), entry.key, f"Labels of {entry.key}")
        for entry in labelled
    ]
    return [page.heading("Labels"), page.paragraph(ABOUT_LABELS), page.grid(figures, narrow=True)]
