import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import tiny
import torch
from matplotlib.image import imread
from safetensors.torch import save_file

from fmdistill import cache, distill, evaluate, recipe, report
from fmdistill.backbones.promptable import PromptHead
from fmdistill.cache.dataset import CachedImages
from fmdistill.distill import student as students
from fmdistill.evaluate.grid_miou import GridMiou
from fmdistill.evaluate.results import Metric, Result, row
from fmdistill.evaluate.text_classifier import class_names
from fmdistill.evaluate.top1 import Top1
from fmdistill.registry import UserError
from fmdistill.report import examples, labels, page, plots, ranked, rows, tables

GROUPS = (None, "photos", "scenes")
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects what a browser would load, the text of every table row by its section, and unbalanced tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loaded, self.rows, self.section, self.faults = [], [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.loaded += [attributes[key] for key in ("src", "srcset", "poster", "data", "action") if key in attributes]
        self.loaded += [attributes["href"]] if tag == "link" else []
        self.section = attributes.get("class", "") if tag == "tbody" else self.section
        if tag == "tr":
            self.rows.append((self.section, ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data):
        if "tr" in self.open:
            section, text = self.rows[-1]
            self.rows[-1] = (section, f"{text} {data}".strip())


def fabricate(folder, miou=0.7, weighting="uniform", floors=True):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(f"""
title: "{weighting} <b>& co</b>"
out: {folder}
images: {{name: scenes}}
teacher: {{name: sam_mini}}
cache: {{root: {folder / "nowhere"}}}
student: {{name: tinyvit_sam_mini}}
task: {{name: distill}}
optimizer: {{name: adamw}}
schedule: {{name: cosine}}
train: {{steps: 29}}
objective: {{embedding: {{distance: {{name: mse}}, weighting: {{name: {weighting}}}}}}}
""")
    lines = [{"step": s, "loss": 1 / s, "embedding": 1 / s, "learning_rate": 0.1 / s} for s in range(1, 30)]
    lines += [{"step": 29, "validation/loss": 0.1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3')
    judged = []
    for subject, value in {"student": miou, **({"mean": 0.2, "untrained": 0.4} if floors else {})}.items():
        for k in (5, 16):
            judged += [row(subject, "miou", value, grid=f"{k}x{k}", group=group) for group in GROUPS]
            judged.append(row(subject, "miou_per_image", value, grid=f"{k}x{k}"))
        judged.append(row(subject, "mse", 1 - value))
    (folder / "evaluation").mkdir()
    store(folder / "evaluation" / "sam_grid_miou.json", Result({"name": "grid_miou"}, judged, dict(GridMiou.metrics)))
    return folder


def store(path, result):
    path.write_text(json.dumps(result.to_json()))


@pytest.fixture
def two(tmp_path):
    return [str(fabricate(tmp_path / "mse")), str(fabricate(tmp_path / "srw", miou=0.76, weighting="srw"))]


def an_example(h=128, w=256):
    y, x = np.mgrid[:h, :w]
    image = np.stack([x % 256, y % 256, (x + y) % 256], axis=2).astype(np.uint8)
    valid = np.zeros((16, 16), bool)
    valid[: h // 16, : w // 16] = True
    teacher, shifted = (x - 100) ** 2 + (y - 60) ** 2 < 900, (x - 110) ** 2 + (y - 60) ** 2 < 900
    weights = np.where(np.arange(256).reshape(16, 16) % 2 == 0, 0.75, 1.25)
    masks = {"teacher": teacher, "mse": shifted, "srw": teacher}
    prompts = {kind: examples.PointMasks((100.0, 60.0), masks) for kind in ("typical", "worst")}
    return examples.Example("a&b", "photos", image, {"srw": weights}, valid, prompts)


def test_page_is_self_contained_and_valid(two, tmp_path, monkeypatch):
    monkeypatch.setattr(
        examples, "gather", lambda runs, trust=False, images=(): ([an_example(), an_example(256, 128)], 16)
    )
    weighed = [np.zeros((8, 8, 3), np.uint8), np.ones((8, 8, 3), np.uint8)]
    monkeypatch.setattr(
        ranked, "gather", lambda runs, trust=False, images=(): [ranked.Ranked("srw", weighed, [1.5, 0.5], 9)]
    )
    path = report.run(two, str(tmp_path / "out"))
    assert path == tmp_path / "out" / "index.html"
    names = {p.name for p in path.parent.iterdir()}
    assert names == {"index.html", "sam_grid_miou.md", "sam_grid_miou.tex", "sam_grid_miou.csv"}
    text = path.read_text()
    parsed = Page(text)
    assert parsed.open == [] and parsed.faults == []
    pictures = 2 * 2 * 4 + 2 + 1 + 2 + 3  # panels of masks, weight maps, images by weight, bars, curves
    assert len(parsed.loaded) == pictures and all(link.startswith("data:image/") for link in parsed.loaded)
    outside = re.sub(r"data:[^\"]*", "", text)
    assert not re.search(r"https?://|url\(|@import|<script", outside)
    assert "&lt;b&gt;&amp; co" in text and "<b>" not in text
    assert "N·w from 0.75 to 1.25 over the 128 patches" in text
    assert "N·w of srw: of 9 images those with the largest weights" in text
    assert outside.index("<table>") < outside.index("One seed") + 2000 < outside.index("Weights of patches")


def test_published_rows_are_in_sections_of_their_own(two):
    path = report.run(two, two[0] + "/report")
    shown = Page(path.read_text()).rows
    own = [text for section, text in shown if section == "run"]
    papers = [text for section, text in shown if section == "published"]
    assert any("mse 70.00 70.00" in text for text in own) and not any("MobileSAM" in text for text in own)
    assert any(text.startswith("MobileSAM + SRW 73.33 74.17") for text in papers)
    assert any("Published: Yu et al., " in text and "ACCV 2024" in text for text in papers)
    assert any("+0.67 +0.64" in text for text in papers)
    assert "No pictures" in path.read_text()  # the fabricated runs have no cache


def test_table_has_differences_and_shares_of_the_way(two):
    table_rows = rows.rows(rows.read_runs(two), "sam_grid_miou")
    assert [(row.name, row.kind) for row in table_rows] == [
        ("mse", "run"), ("srw", "run"), ("mean", "floor"), ("untrained", "floor"),
    ]  # fmt: skip
    table = tables.build(table_rows, GridMiou.metrics)
    groups = ("mIoU, all images", "mIoU, photos", "mIoU, scenes")
    assert [(c.group, c.label) for c in table.columns] == [
        *((group, label) for group in groups for label in ("5×5", "16×16")), ("feature", "mse"),
    ]  # fmt: skip
    by_kind = {section.kind: section.rows for section in table.sections}
    assert by_kind["difference"][0].cells["miou", (("grid", "5x5"),)] == pytest.approx(0.06)
    scenes = ("miou", (("grid", "16x16"), ("group", "scenes")))
    assert by_kind["closed"][1].cells[scenes] == pytest.approx((0.76 - 0.4) / (1 - 0.4))
    assert ("mse", ()) not in by_kind["closed"][0].cells  # the evaluator states no end


def test_text_fits_a_terminal_and_warns_of_one_seed(two):
    text = report.text(two)
    assert "70.00" in text and "+6.00" in text and report.ONE_SEED in text
    table = text.split(report.ONE_SEED)[0].splitlines()
    assert max(map(len, table)) <= 110
    heading, line = (next(i for i, text in enumerate(table) if text.startswith(s)) for s in ("Runs", "mse"))
    assert line == heading + 1


def classified(folder, name, top1, teacher=0.9, floors=("chance",), protocol="top"):
    judged = []
    for subject, value in {"student": top1, "teacher": teacher, **dict.fromkeys(floors, 0.1)}.items():
        judged += [row(subject, metric, value) for metric in ("top1", "top5", "mean_per_class_recall")]
        if subject not in floors:
            judged += [row(subject, "top1", value - 0.1 + n / 50, quartile=f"q{n}") for n in range(1, 5)]
    run = fabricate(folder / name)
    (run / "evaluation" / "sam_grid_miou.json").unlink()
    described = (dict(Top1.metrics), dict(Top1.dimensions))
    store(run / "evaluation" / "top.json", Result({"name": protocol}, judged, *described))
    return str(run)


def test_shares_of_a_classifier_are_percent_beside_their_teacher(tmp_path):
    runs = [classified(tmp_path, "mse", 0.5), classified(tmp_path, "srw", 0.55)]
    table_rows = rows.rows(rows.read_runs(runs), "top")
    assert [(row.name, row.kind) for row in table_rows] == [
        ("mse", "run"), ("srw", "run"), ("teacher", "teacher"), ("chance", "floor"),
    ]  # fmt: skip
    table = tables.build(table_rows, Top1.metrics)
    shown = [(column.group, column.label, column.percent) for column in table.columns]
    assert shown[:5] == [("top-1", label, True) for label in ("all", "q1", "q2", "q3", "q4")]
    assert shown[5:] == [("top-5", "all", True), ("class recall", "all", True)]
    by_kind = {section.kind: section.rows for section in table.sections}
    assert by_kind["closed"][0].cells["top1", ()] == pytest.approx((0.5 - 0.1) / (0.9 - 0.1))
    assert ("top1", (("quartile", "q1"),)) not in by_kind["closed"][0].cells  # no floor says where that way begins
    text = report.text(runs)
    assert "55.00" in text and "+5.00" in text and "62.50" not in text.split("Share")[0]
    assert max(map(len, text.split(report.ONE_SEED)[0].splitlines())) <= 110
    shown = report.run(runs, str(tmp_path / "out")).read_text()
    assert "q1 holds the least similar" in shown and "mIoU" not in shown


def test_without_a_teacher_no_share_of_the_way_is_claimed(tmp_path):
    run = classified(tmp_path, "mse", 0.5)
    path = tmp_path / "mse" / "evaluation" / "top.json"
    path.write_text(path.read_text().replace('"subject": "teacher"', '"subject": "another"'))
    table = tables.build(rows.rows(rows.read_runs([run]), "top"), Top1.metrics)
    assert [section.kind for section in table.sections] == ["run", "floor"]


def test_the_way_of_a_metric_that_is_better_lower_begins_at_the_lowest_floor(tmp_path):
    run = fabricate(tmp_path / "run")
    judged = [row(name, "error", value) for name, value in {"student": 0.3, "low": 0.5, "high": 0.9}.items()]
    judged += [row(name, "odd", value) for name, value in {"student": 2, "low": 1, "high": 0}.items()]
    store(
        run / "evaluation" / "e.json", Result({"name": "e"}, judged, {"error": Metric("error", better="lower", end=0)})
    )
    (read,) = rows.read_runs([run])
    table = tables.build(rows.rows([read], "e"), read.evaluations["e"].metrics)
    (closed,) = next(section.rows for section in table.sections if section.kind == "closed")
    assert closed.cells == {("error", ()): pytest.approx(0.4)}  # nothing is stated of the other one
    assert [(c.group, c.label, c.percent) for c in table.columns] == [("error", "all", False), ("odd", "all", False)]


def test_the_description_of_a_metric_heads_its_columns_and_is_in_the_page(tmp_path):
    run = fabricate(tmp_path / "run")
    judged = [row("student", "pck", 0.25, k=k, joint=joint) for k in (1, 2) for joint in ("hand", "foot")]
    metrics = {"pck": Metric("PCK", across="joint", percent=True, help="PCK: keypoints within reach, × 100.")}
    dimensions = {"k": "k: the reach in pixels.", "other": "No column has it."}
    store(run / "evaluation" / "own.json", Result({"name": "a.b:C"}, judged, metrics, dimensions))
    assert "run  25.00  25.00  25.00  25.00" in report.text([str(run)])
    (read,) = rows.read_runs([run])
    table = tables.build(rows.rows([read], "own"), read.evaluations["own"].metrics)
    assert [(c.group, c.label) for c in table.columns] == [
        ("PCK, k=1", "hand"), ("PCK, k=1", "foot"), ("PCK, k=2", "hand"), ("PCK, k=2", "foot"),
    ]  # fmt: skip
    shown = report.run([str(run)], str(tmp_path / "out")).read_text()
    assert "PCK: keypoints within reach" in shown and "the reach in pixels" in shown and "No column" not in shown


def test_a_result_of_an_older_format_is_a_one_line_error(tmp_path):
    run = fabricate(tmp_path / "run")
    path = run / "evaluation" / "sam_grid_miou.json"
    path.write_text(json.dumps({"protocol": {"name": "grid_miou"}, "metrics": {"student/5x5/miou": 0.5}}))
    with pytest.raises(UserError, match=r"sam_grid_miou\.json: a result of another version .* evaluate` again"):
        rows.read_runs([run])


def test_differing_floors_are_all_listed(tmp_path):
    a, b = fabricate(tmp_path / "a"), fabricate(tmp_path / "b")
    path = b / "evaluation" / "sam_grid_miou.json"
    path.write_text(path.read_text().replace("0.4", "0.3"))
    names = [row.name for row in rows.rows(rows.read_runs([a, b]), "sam_grid_miou") if row.kind == "floor"]
    assert names == ["mean", "untrained", "untrained (b)"]


def test_runs_of_the_same_name_are_named_by_their_folders(tmp_path):
    folders = [fabricate(tmp_path / seed / "srw") for seed in ("seed0", "seed1")]
    assert [run.name for run in rows.read_runs(folders)] == ["seed0/srw", "seed1/srw"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda run: (run / "recipe.yaml").unlink(), "not a run"),
        (lambda run: (run / "evaluation" / "sam_grid_miou.json").write_text("{"), "not JSON"),
        (lambda run: (run / "metrics.jsonl").write_text("x\n{}\n"), "metrics.jsonl:1"),
    ],
)
def test_a_damaged_run_is_a_one_line_error(tmp_path, damage, says):
    run = fabricate(tmp_path / "run")
    damage(run)
    with pytest.raises(UserError, match=says) as error:
        report.run([str(run)], str(tmp_path / "out"))
    assert "\n" not in str(error.value)


def test_a_run_without_evaluation_still_has_curves(tmp_path):
    run = fabricate(tmp_path / "run")
    (run / "evaluation" / "sam_grid_miou.json").unlink()
    text = report.run([str(run)], str(tmp_path / "out")).read_text()
    assert "has been evaluated yet" in text and "data:image/svg+xml" in text


def test_published_tables_load_and_bad_ones_do_not(tmp_path):
    [table] = rows.published({"name": "grid_miou", "k": [5, 16, 32]})
    assert table.rows[1].cells["miou", (("grid", "32x32"),)] == pytest.approx(0.7405)
    [imagenet] = rows.published({"name": "zeroshot", "classnames": "imagenet", "limit": None})
    assert imagenet.rows[0].cells["top1", ()] == pytest.approx(0.218)
    assert rows.published({"name": "zeroshot", "classnames": "eval/clip_mini.classes.txt"}) == []
    bad = tmp_path / "bad.yaml"
    bad.write_text("source: x\n")
    with pytest.raises(UserError, match="unit"):
        rows.read_published(bad)
    for listed, message in (
        ("{KD: {top1: 1}}", r"rows \(a list\)"),
        ("[{subject: KD, top1: 1}]", "rows: expected {subject: NAME"),
        ("[{subject: KD, metric: top1, value: high}]", "rows: expected .* got .*'high'"),
    ):
        bad.write_text(f"source: x\nsetting: y\nprotocol: {{name: top1}}\nunit: percent\nrows: {listed}\n")
        with pytest.raises(UserError, match=message):
            rows.read_published(bad)


def test_curves_draw_each_quantity_once():
    assert plots.curve_figures({"one": []}) == {}
    log = [{"step": s, "loss": 1.0, "embedding": 1.0, "validation/loss": 2.0, "images_per_second": 3.0} for s in (1, 2)]
    figures = plots.curve_figures({"one": log})
    assert list(figures) == ["loss", "validation/loss"] and all(b"<svg" in figure for figure in figures.values())


def test_paint_colours_by_the_masks_of_a_pixel():
    teacher, mask = np.array([[True, True, False, False]]), np.array([[True, False, True, False]])
    painted = plots.paint(np.full((1, 4, 3), 100, np.uint8), teacher, mask, alpha=1.0)
    assert painted[0, :3].tolist() == [list(plots.AGREED), list(plots.MISSED), list(plots.ADDED)]
    assert len(set(painted[0, 3].tolist())) == 1


def test_figures_are_pictures_with_the_weights_where_they_belong():
    example = an_example()
    hot = np.ones((16, 16))
    hot[1, 2] = 3.0  # pixels 32 to 48 across, 16 to 32 down
    grey = np.full((128, 256, 3), 128, np.uint8)
    picture = plots.weight_map_figure(grey, hot, example.valid)
    rgb = imread(BytesIO(picture))[..., :3]
    panel = np.abs(rgb - (0.65 * 0.97 + 0.35 * 128 / 255)).max(2) < 0.03  # near white over grey
    columns = np.flatnonzero(panel.mean(0)[: int(0.91 * rgb.shape[1])] > 0.8)  # the rest is the colour bar
    lines = np.flatnonzero(panel.mean(1) > 0.3)
    (left, right), (top, bottom) = columns[[0, -1]], lines[[0, -1]]
    red = np.argwhere((rgb[..., 0] - rgb[..., 2])[top:bottom, left:right] > 0.1)
    y, x = red.mean(0) / (bottom - top, right - left)
    assert abs(x - 40 / 256) < 0.02 and abs(y - 24 / 128) < 0.02
    assert all(
        png.startswith(b"\x89PNG")
        for png in plots.mask_figures(example.image, (3, 4), example.prompts["worst"].masks).values()
    )
    assert base64.b64encode(picture).decode() in page.figure(picture, "c", "a")


def test_points_are_those_of_median_and_of_least_agreement_within_the_area():
    teacher = torch.zeros(6, 10, 10, dtype=torch.bool)
    teacher[0, :1, :2] = True  # 2 %: too small
    teacher[1:5, :2, :5] = True
    teacher[5] = True  # too large
    a, b = teacher.clone(), teacher.clone()
    a[0], a[5] = False, False
    a[2, :2, :1] = b[2, :2, :1] = False  # IoU 0.8 of both
    a[3, :2, :4] = False  # IoU 0.2 and 1
    b[4, 5:] = True  # IoU 1 and 10 / 60
    assert examples.choose_points(teacher, [a, b], 100) == {"typical": 2, "worst": 4}
    assert examples.choose_points(teacher, [a], 100) == {"typical": 1, "worst": 3}
    assert examples.choose_points(teacher[:1], [a[:1]], 100) == {}


def test_the_page_opens_with_masks_typical_ones_first_and_ends_with_weights(two, tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "gather", lambda runs, trust, images: ([an_example()], 16))
    monkeypatch.setattr(ranked, "gather", lambda runs, trust, images: [])
    monkeypatch.setattr(labels, "gather", lambda runs: [])
    html = report.run(two, str(tmp_path / "out")).read_text()
    headings = ("Typical masks", "Worst masks", "Results", "Training", "Weights of patches")
    places = [html.index(f"<h2>{name}</h2>") for name in headings]
    assert places == sorted(places)


def test_examples_come_from_a_cache_and_its_students(tmp_path, monkeypatch):
    settings = recipe.load(
        "recipes/demo/sam_srw.yaml",
        [
            "images.name=scenes", "images.train=2", "images.validation=2", f"cache.root={tmp_path / 'cache'}",
            f"out={tmp_path / 'run'}", "objective.embedding.weighting.temperature=0.5",
        ],
    )  # fmt: skip
    cache.run(settings)
    recipe.save(settings, settings.out)
    torch.manual_seed(0)
    save_file(students.build(settings.student).state_dict(), tmp_path / "run" / "student.safetensors")
    monkeypatch.setattr(PromptHead, "decode", None)  # the slow path, an image token at a time for every prompt
    shown, stride = examples.gather(rows.read_runs([settings.out]), per_group=2)
    assert len(shown) == 2 and stride == 16
    for example in shown:
        h, w = example.image.shape[:2]
        assert example.valid.sum() == -(-h // 16) * -(-w // 16)
        assert example.weights["run"].mean() == pytest.approx(1, abs=1e-3)  # padding: include
        for prompt in example.prompts.values():
            assert list(prompt.masks) == ["teacher", "run"]
            assert all(mask.shape == (h, w) and mask.dtype == bool for mask in prompt.masks.values())


def untrained_clip(folder):
    """Cache the CLIP demo's ten validation images, store an untrained student as its run, and return the recipe."""
    small = ["images.train=2", "images.validation=10", f"cache.root={folder / 'cache'}", f"out={folder / 'run'}"]
    settings = recipe.load("recipes/demo/clip_srw.yaml", small)
    cache.run(settings)
    recipe.save(settings, settings.out)
    torch.manual_seed(0)
    save_file(students.build(settings.student).state_dict(), folder / "run" / "student.safetensors")
    return settings


def test_whole_images_are_ranked_by_their_weight(tmp_path):
    settings = untrained_clip(tmp_path)
    runs = rows.read_runs([settings.out])
    [entry] = ranked.gather(runs, shown=4)
    assert entry.name == "run" and entry.weighed == 10 and len(entry.images) == 4
    assert entry.weights == sorted(entry.weights, reverse=True) and entry.weights[0] > 1 > entry.weights[-1]
    data = CachedImages(cache.open_cache(settings), "validation")
    items = [tiny.item(data, 0, index) for index in range(10)]
    unit = torch.nn.functional.normalize(torch.stack([item["outputs"]["clip.embedding"] for item in items]), dim=1)
    similarity = (unit @ unit.T).mean(1)
    assert np.array_equal(entry.images[0], items[int(similarity.argmin())]["pixels"].permute(1, 2, 0).numpy())
    keys = [data.shards[0].keys[index] for index in (4, 0, 2)]
    [chosen] = ranked.gather(runs, images=keys)
    assert chosen.weighed == len(chosen.images) == 3 and sum(chosen.weights) == pytest.approx(3)
    shown, _ = examples.gather(runs, per_group=2)
    assert [(dict(example.weights), example.prompts) for example in shown] == [({}, {})] * 2
    page_html = report.run([settings.out], str(tmp_path / "out")).read_text()
    assert "Weights of images" in page_html and "<h2>Labels" not in page_html


@pytest.mark.slow
def test_a_clip_report_shows_labels_on_which_teacher_and_students_agree_and_not(tmp_path):
    settings = untrained_clip(tmp_path)
    keys = [key for shard in cache.open_cache(settings).shards["validation"] for key in shard.keys]
    protocol = evaluate.load("eval/clip_zeroshot_demo.yaml").to_json()
    answers = {"teacher": lambda i: i, "student": lambda i: i if i < 7 else 0}
    images = [
        {"key": key, "subject": subject, "label": 0, "prediction": answer(i)}
        for subject, answer in answers.items()
        for i, key in enumerate(keys)
    ]
    stored = {**Result(protocol, [row("student", "top1", 0.7)]).to_json(), "images": images}
    evaluate.write(tmp_path / "run" / "evaluation" / "clip_zeroshot_demo.json", stored)
    shown = labels.gather(rows.read_runs([settings.out]), shown=3)
    names = class_names(protocol["classnames"])
    assert [entry.key for entry in shown] == [keys[i] for i in (0, 3, 6, 7, 8, 9)]
    assert shown[0].answers == {"teacher": names[0], "run": names[0]}
    assert shown[-1].answers == {"teacher": names[9], "run": names[0]}
    assert shown[0].image.shape == (64, 64, 3)
    assert [(entry.agrees, entry.share) for entry in shown] == [(True, 0.7)] * 3 + [(False, 0.3)] * 3
    html = report.run([settings.out], str(tmp_path / "out")).read_text()
    assert html.index("<h2>Labels as the teacher&#x27;s") < html.index("<h2>Other labels than the teacher&#x27;s")
    assert "30 % of those judged; 3 of them" in html


def test_weights_by_key_are_shown_of_an_embedding_run(tmp_path):
    recipe = tiny.load(tmp_path)
    cache.run(recipe)
    keys = [key for shard in cache.open_cache(recipe).shards["train"] for key in shard.keys]
    (tmp_path / "weights.json").write_text(json.dumps({key: 1 + n % 2 for n, key in enumerate(keys)}))
    weighting = f"objective.embedding.weighting={{name: by_key, weights: {tmp_path}/weights.json}}"
    out = distill.run(tiny.load(tmp_path, weighting, "train.steps=2"))
    shown, stride = examples.gather(rows.read_runs([str(out)]), trust=True)
    assert len(shown) == 3 and stride == 16
    assert all(example.weights == {} for example in shown)  # no patch of an image weighs more than another
