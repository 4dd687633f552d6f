"""Lay out the pictures of a report: masks, labels, and the weights of patches and of images."""

from collections.abc import Sequence

from fmdistill.report import examples, labels, page, plots, ranked
from fmdistill.report.rows import Run

ABOUT_WEIGHTS = (
    "The weight of every patch in the loss, as in training, over the grey image: red patches count more than the "
    "average patch, blue ones less, white ones exactly as much; each image has its own scale. SRW gives high weights "
    "to patches whose teacher embedding is unlike the rest of its image. N·w is a weight relative to the mean."
)
ABOUT_IMAGE_WEIGHTS = (
    "The weight of whole images in the loss, computed with these images as one batch. SRW gives high weights "
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
ABOUT_LABELS = {
    True: ("Labels as the teacher's", "Images on which the first run gives the teacher's label"),
    False: ("Other labels than the teacher's", "Images on which the first run gives another label than the teacher"),
}


def gather(runs: list[Run], trust: bool, images: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Return, as HTML, the pictures of what the networks answer, which open a page, and those of weights, which end it.

    Masks and weights are those of the `images` that are named, else of a few validation images. Raises UserError if
    images, cache, teacher or students are missing.
    """
    shown, stride = examples.gather(runs, trust=trust, images=images)
    by_image = ranked.gather(runs, trust=trust, images=images)
    labelled = labels.gather(runs)
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
            panels = plots.mask_figures(example.image, prompt.point, prompt.masks)
            figures.append(page.panels(panels, caption, f"Masks of teacher and students on {example.key}"))
        if figures:
            parts += [page.heading(heading), page.paragraph(about), key, *figures]
    return parts


def _labels(labelled: list[labels.Labelled]) -> list[str]:
    parts = []
    for agrees, (heading, about) in ABOUT_LABELS.items():
        members = [entry for entry in labelled if entry.agrees is agrees]
        figures = [
            page.figure(plots.labels_figure(entry.image, entry.answers), entry.key, f"Labels of {entry.key}")
            for entry in members
        ]
        if figures:
            text = f"{about}, {100 * members[0].share:.0f} % of those judged; {len(figures)} of them, evenly spread."
            parts += [page.heading(heading), page.paragraph(text), page.grid(figures, narrow=True)]
    return parts
