"""runs -> what a person looks at: one self-contained HTML page, and the same tables as text."""

from pathlib import Path

from fmdistill.evaluate.results import Result
from fmdistill.files import check_folder, write_whole
from fmdistill.logs import log
from fmdistill.registry import UserError
from fmdistill.report import examples, page, plots, ranked, rows, tables
from fmdistill.report.rows import Run

ONE_SEED = (
    "One seed is not a comparison: two seeds of one recipe differ by amounts like those between these rows, "
    "so a difference counts only when it holds over several seeds."
)
ABOUT_PUBLISHED = (
    "Shaded rows are a paper's, with another teacher, other images and a larger student: set their differences beside "
    "ours, not their values."
)
ABOUT_CURVES = (
    "Each panel is one logged quantity, a line per run. A weighted and an unweighted loss are different quantities: "
    "compare runs by the table, and a run's curve with itself. The effective sample size is (Σw)²/(N Σw²), 1 where "
    "every patch or image counts the same."
)
ABOUT_WEIGHTS = (
    "The weight of every patch in the loss, as training computed it, over the grey picture: red patches count more "
    "than the average patch, blue ones less, white is exactly average; each picture has its own scale. SRW gives "
    "high weights to patches whose teacher embedding is unlike the rest of its image. N·w is a weight relative to the "
    "mean."
)
ABOUT_IMAGE_WEIGHTS = (
    "The weight of whole images in the loss, computed over validation images as one batch. SRW gives high weights to "
    "images whose teacher embedding is unlike the others'. N·w is a weight relative to the mean."
)
ABOUT_MASKS = (
    "One point per image, the same for every network; each mask is the one with the network's own highest predicted "
    "IoU. The point is, of a 10×10 grid, that where the runs disagree most among the teacher masks of 3 to 30 % of the "
    "image (with one run: where the teacher is surest). It is chosen to show a difference, so it is not typical: "
    "the table above is the measurement."
)


def run(runs: list[str], out: str, trust: bool = False) -> Path:
    """Write the report of the run folders to `out`/index.html and return that path.

    Pictures need the runs' students; those that name code outside fmdistill are imported only with `trust`.
    """
    check_folder(out, "the report")
    found = rows.read_runs(runs)
    parts = [_heads(found), *_tables(found), *_curves(found), *_pictures(found, trust)]
    path = Path(out).expanduser() / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.page("Distillation report", parts))
    return path


def text(runs: list[str]) -> str:
    """Return the tables of the run folders for a terminal, with the sentence about seeds."""
    found = rows.read_runs(runs)
    shown = [f"{protocol}\n{tables.plain(table)}" for protocol, _, table in _built(found)]
    return "\n\n".join([*(shown or ["no evaluation yet: `fmdistill evaluate PROTOCOL RUN`"]), ONE_SEED])


def _built(runs: list[Run]) -> list[tuple[str, Result, tables.Table]]:
    """Return each protocol with a result that states how its metrics read, and its table."""
    stated = {stem: result for run in runs for stem, result in run.evaluations.items()}
    return [
        (stem, result, tables.build(rows.rows(runs, stem), result.metrics, rows.published(result.protocol)))
        for stem, result in stated.items()
    ]


def _heads(runs: list[Run]) -> str:
    return page.definitions(
        (run.name, f"{run.recipe.title or 'untitled recipe'} · seed {run.recipe.seed}") for run in runs
    )


def _tables(runs: list[Run]) -> list[str]:
    parts = [page.heading("Results"), page.paragraph(ONE_SEED, "notice")]
    built = _built(runs)
    if not built:
        return [*parts, page.paragraph("None of these runs has been evaluated yet: fmdistill evaluate PROTOCOL RUN.")]
    for protocol, _, table in built:
        parts += [page.heading(f"Protocol {protocol}", 3), tables.html(table)]
    told = [text for _, result, table in built for text in _how_to_read(result, table)]
    if any(section.kind == "published" for _, _, table in built for section in table.sections):
        told.append(ABOUT_PUBLISHED)
    return [*parts, page.paragraph(" ".join(dict.fromkeys(told)))]


def _how_to_read(result: Result, table: tables.Table) -> list[str]:
    """Return the evaluator's sentences about the metrics and dimensions that the table shows."""
    metrics = dict.fromkeys(column.key[0] for column in table.columns)
    dimensions = dict.fromkeys(name for column in table.columns for name, _ in column.key[1])
    told = [*(result.metric(name).help for name in metrics), *(result.dimensions.get(name, "") for name in dimensions)]
    return [text for text in told if text]


def _curves(runs: list[Run]) -> list[str]:
    picture = plots.curves_figure({run.name: run.log for run in runs})
    if picture is None:
        return []
    caption = "Training logs. Axes are logarithmic where a loss or a norm spans more than a factor of five."
    figure = page.figure(picture, caption, "Loss curves, one line per run", wide=True)
    return [page.heading("Training"), page.paragraph(ABOUT_CURVES), figure]


def _pictures(runs: list[Run], trust: bool) -> list[str]:
    try:
        shown, stride = examples.gather(runs, trust=trust)
        by_image = ranked.gather(runs, trust=trust)
    except UserError as error:
        log.warning("report: no pictures: %s", error)
        return [page.heading("Pictures"), page.paragraph(f"No pictures: {error}", "notice")]
    return [*_weight_maps(shown, stride), *_weighed_images(by_image), *_masks(shown)]


def _weight_maps(shown: list[examples.Example], stride: int) -> list[str]:
    figures = []
    for example in shown:
        for name, weight in example.weights.items():
            inside = weight[example.valid]
            picture = plots.weight_map_figure(example.image, weight, example.valid, stride)
            caption = (
                f"{example.group}, {example.key}: weights of {name}, N·w from {inside.min():.2f} to {inside.max():.2f} "
                f"over the {example.valid.sum()} patches with picture (of {example.valid.size})."
            )
            figures.append(page.figure(picture, caption, f"Weight map of {example.key}"))
    if not figures:
        return []
    return [page.heading("Where the loss looks: patch weights"), page.paragraph(ABOUT_WEIGHTS), page.grid(figures)]


def _weighed_images(by_image: list[ranked.Ranked]) -> list[str]:
    figures = []
    for found in by_image:
        picture = plots.strip_figure(found.images, [f"{weight:.2f}" for weight in found.weights])
        caption = f"N·w by {found.name}: the heaviest images of {found.weighed}, heaviest first, then the lightest."
        figures.append(page.figure(picture, caption, f"Images by their weight, {found.name}", wide=True))
    if not figures:
        return []
    return [page.heading("What the loss looks at: image weights"), page.paragraph(ABOUT_IMAGE_WEIGHTS), *figures]


def _masks(shown: list[examples.Example]) -> list[str]:
    key = page.colour_key(
        (
            (plots.AGREED, "in both masks"),
            (plots.MISSED, "teacher only (missed)"),
            (plots.ADDED, "student only (added)"),
        )
    )
    figures = []
    for example in shown:
        if example.point is None:
            continue
        x, y = example.point
        share = 100 * example.masks["teacher"].mean()
        caption = (
            f"{example.group}, {example.key}: point ({x:.0f}, {y:.0f}) of the resized image, "
            f"where the teacher's mask covers {share:.0f} % of it."
        )
        picture = plots.mask_figure(example.image, example.point, example.masks)
        figures.append(page.figure(picture, caption, f"Masks of teacher and students on {example.key}", wide=True))
    if not figures:
        return []
    return [page.heading("What the students see: masks"), page.paragraph(ABOUT_MASKS), key, *figures]
