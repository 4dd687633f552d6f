"""Draw figures from arrays: loss curves, patch weights over an image, and masks with their differences."""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from fmdistill.report.bars import Bars

# Letters: H x W pixels of the resized image, g patches a side.

PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
)  # Okabe and Ito: safe for colour-blind eyes
AGREED, MISSED, ADDED = (0, 114, 178), (255, 215, 0), (213, 40, 120)  # RGB: in both masks, teacher only, student only
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "svg.hashsalt": "fmdistill",
}
LOGARITHMIC = 5  # an axis is logarithmic if its largest value exceeds the smallest by this factor
PANELS = (  # the logged quantities to draw, in order; the terms' own are left out, as a single term's is the loss
    "loss",
    "validation/loss",
    "[^/]+/effective_sample_size",
    "[^/]+/largest_weight",
    "grad_norm",
    "learning_rate",
)


def curve_figures(logs: Mapping[str, Sequence[Mapping[str, Any]]], limit: int = 9) -> dict[str, bytes]:
    """Draw one figure per logged quantity, the loss first, with a line per run; return SVG by the quantity's name."""
    figures = {}
    for key in _logged(logs)[:limit]:
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(4.2, 2.9), layout="constrained")
            axes = figure.add_subplot()
            _curves(axes, key, logs)
            _legend(figure, axes)
            figures[key] = _save(figure, "svg")
    return figures


def bars_figure(bars: Bars) -> bytes:
    """Draw bars side by side for each part of the images, a colour per run, with the intervals; return SVG."""
    scale = 100 if bars.percent else 1
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "y"}):
        figure = Figure(figsize=(4.2, 2.9), layout="constrained")
        axes = figure.add_subplot()
        places, width = np.arange(len(bars.labels)), 0.8 / len(bars.values)
        for number, (name, values) in enumerate(bars.values.items()):
            x = places + (number - (len(bars.values) - 1) / 2) * width
            heights = [np.nan if value is None else scale * value for value in values]
            axes.bar(x, heights, 0.94 * width, label=name, color=PALETTE[number % len(PALETTE)], alpha=0.85)
            for place, interval in zip(x, bars.intervals[name], strict=True):
                if interval is not None:
                    axes.plot(
                        [place, place], [scale * interval.low, scale * interval.high], color="0.15", linewidth=1.3
                    )
        axes.axhline(0, color="0.3", linewidth=0.8)
        if not axes.dataLim.height:  # all are zero
            axes.set_ylim(0, scale)
        axes.set_xticks(places, bars.labels, rotation=25 if max(map(len, bars.labels)) > 6 else 0, parse_math=False)
        axes.set_title(bars.title, parse_math=False)
        _legend(figure, axes)
        return _save(figure, "svg")


def weight_map_figure(image: np.ndarray, weights: np.ndarray, valid: np.ndarray, stride: int = 16) -> bytes:
    """Draw an image (H, W, 3) uint8 and its weights (g, g), mean one, over the grey image beside it; return PNG.

    Patches that are not `valid` (g, g) bool are left out. White is 1, and the colours span this image's weights.
    """
    height, width = image.shape[:2]
    shown = np.ma.masked_where(~valid, weights)
    span = max(float(np.abs(shown - 1).max()), 1e-6)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(6.4, 2.8 * min(1.0, height / width) + 0.1), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.imshow(image)
        right.imshow(image.mean(axis=2), cmap="gray", vmin=0, vmax=255)
        grid = weights.shape[0] * stride
        heat = right.imshow(shown, cmap="RdBu_r", norm=CenteredNorm(1.0, span), alpha=0.65, extent=(0, grid, grid, 0))
        _frame(left, height, width)
        _frame(right, height, width)
        left.set_anchor("E")  # a tall picture stays beside its map
        right.set_anchor("W")
        _bar(figure, right, heat, span)
        return _save(figure, "png")


def weights_figure(weights: np.ndarray, valid: np.ndarray, title: str) -> bytes:
    """Draw weights (g, g), mean one, without their image, in the colours of `weight_map_figure`; return PNG.

    Patches that are not `valid` (g, g) bool are hatched.
    """
    shown = np.ma.masked_where(~valid, weights)
    span = max(float(np.abs(shown - 1).max()), 1e-6)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(4.2, 3.8), layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor("0.92")
        axes.patch.set(hatch="///", edgecolor="0.75")
        heat = axes.imshow(shown, cmap="RdBu_r", norm=CenteredNorm(1.0, span), interpolation="nearest")
        _frame(axes, *weights.shape)
        axes.set_title("\n".join(textwrap.wrap(title, 60)), fontsize=8, parse_math=False)
        _bar(figure, axes, heat, span)
        return _save(figure, "png")


def mask_figures(image: np.ndarray, point: tuple[float, float], masks: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """Draw an image (H, W, 3) uint8 with the point (x, y), then each of `masks`, (H, W) bool; return PNG by caption.

    The first mask is the teacher's; the others show their agreement with it in the colours AGREED, MISSED and ADDED.
    """
    teacher = next(iter(masks.values()))
    figures = {"image and point": _point_figure(image, point)}
    for number, (name, mask) in enumerate(masks.items()):
        iou = f", IoU {_iou(teacher, mask):.2f}" if number else ""
        figures[f"{name}{iou}"] = _point_figure(paint(image, teacher, mask), point)
    return figures


def _point_figure(image: np.ndarray, point: tuple[float, float]) -> bytes:
    height, width = image.shape[:2]
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(2.6, 2.6 * height / width))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(image)
        axes.plot(*point, marker="o", markersize=6, color="#39ff14", markeredgecolor="black", markeredgewidth=1.2)
        _frame(axes, height, width)
        return _save(figure, "png")


def labels_figure(image: np.ndarray, answers: Mapping[str, str]) -> bytes:
    """Draw an image (h, w, 3) uint8 above each network's answer, the teacher's first; return PNG.

    An answer that is not the teacher's is in the colour ADDED.
    """
    first = next(iter(answers.values()))
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        line = 0.2  # inches
        text, whole = line * len(answers), 2.2 + line * len(answers)
        figure = Figure(figsize=(2.2, whole))
        axes = figure.add_axes((0, text / whole, 1, 1 - text / whole))
        axes.imshow(image)
        _frame(axes, *image.shape[:2])
        for number, (name, answer) in enumerate(answers.items(), start=1):
            colour = "black" if answer == first else tuple(channel / 255 for channel in ADDED)
            height = (text - line * (number - 0.25)) / whole
            figure.text(0.01, height, f"{name}: {answer}", fontsize=7.5, color=colour, parse_math=False)
        return _save(figure, "png")


def strip_figure(images: Sequence[np.ndarray], titles: Sequence[str]) -> bytes:
    """Draw a row of images (h, w, 3) uint8, each below its title; return PNG."""
    with matplotlib.rc_context(STYLE | {"axes.grid": False, "axes.titlelocation": "center"}):
        figure = Figure(figsize=(0.95 * len(images), 1.2), layout="constrained")
        for axes, image, title in zip(np.ravel(figure.subplots(1, len(images))), images, titles, strict=True):
            axes.imshow(image)
            axes.set_title(title, fontsize=8)
            _frame(axes, *image.shape[:2])
        return _save(figure, "png")


def paint(image: np.ndarray, teacher: np.ndarray, mask: np.ndarray, alpha: float = 0.6) -> np.ndarray:
    """Return the image in grey, (H, W, 3) uint8, with the pixels of both masks coloured: AGREED, MISSED or ADDED."""
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2) * 0.8 + 40
    for region, colour in ((teacher & mask, AGREED), (teacher & ~mask, MISSED), (mask & ~teacher, ADDED)):
        grey[region] = (1 - alpha) * grey[region] + alpha * np.array(colour)
    return grey.round().clip(0, 255).astype(np.uint8)


def _logged(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    keys = dict.fromkeys(key for lines in logs.values() for line in lines for key in line)
    ranked = [(rank, key) for key in keys for rank, pattern in enumerate(PANELS) if re.fullmatch(pattern, key)]
    return [key for _, key in sorted(ranked, key=lambda pair: pair[0])]


def _curves(axes: Any, key: str, logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    drawn = []
    for i, (name, lines) in enumerate(logs.items()):
        points = [
            (line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float) and "step" in line
        ]
        steps, values = np.array(points, dtype=float).reshape(-1, 2).T
        marker = "o" if len(steps) < 20 else None
        colour = PALETTE[i % len(PALETTE)]
        width = max(1.0, 2.4 - 0.9 * i)  # so that a line remains visible below another that covers it
        axes.plot(steps, values, label=name, color=colour, linewidth=width, alpha=0.9, marker=marker, markersize=3)
        drawn.append(values)
    values = np.concatenate(drawn)
    spread = len(values) > 0 and values.min() > 0 and values.max() > LOGARITHMIC * values.min()
    if spread and key != "learning_rate":  # whose panel shows the schedule's shape
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(key.replace("_", " "))
    axes.set_xlabel("step")


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), 60 // (6 + max(map(len, labels), default=0))))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=8)


def _bar(figure: Figure, axes: Any, heat: Any, span: float) -> None:
    ends = max(0.0, 1 - span), 1 + span  # no weight is negative
    bar_axes = axes.inset_axes((1.03, 0, 0.04, 1))
    bar = figure.colorbar(heat, cax=bar_axes, ticks=np.linspace(*ends, 5).tolist(), format="%.2f")
    bar.ax.set_ylim(*ends)


def _frame(axes: Any, height: int, width: int) -> None:
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0


def _save(figure: Figure, kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "svg":
        figure.savefig(file, format=kind, metadata={"Date": None})
    else:
        figure.savefig(file, format=kind, dpi=130, bbox_inches="tight", pad_inches=0.03)
    return file.getvalue()
