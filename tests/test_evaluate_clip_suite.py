"""A suite's figures are those of plain open_clip loops and scikit-learn, on folders as clip_benchmark writes them."""

import io
import json
import tarfile
from pathlib import Path

import clip_run
import numpy as np
import open_clip
import PIL.Image
import pytest
import torch
from nondegenerate import randomize
from sklearn.metrics import balanced_accuracy_score, f1_score

from fmdistill import cache, distill, evaluate
from fmdistill.evaluate import annotated
from fmdistill.evaluate.results import value
from fmdistill.registry import UserError

NAMES = [clip_run.CLASSES[name] for name in sorted(clip_run.CLASSES)]
TEMPLATES = ["a photo of a {}.", "the {}!"]
CAPTIONS = [["a fox", "a red fox here"], ["an owl"], ["a tram", "a tram away"], ["ice"], ["a pear"], ["the sky"]]


def write_layout(folder: Path, tars: list[list[tuple[bytes, str, str]]], **texts: str) -> None:
    """Write tars of (picture, suffix, annotation), and texts by the name of their file without .txt."""
    (folder / "test").mkdir(parents=True)
    (folder / "test/nshards.txt").write_text(f"{len(tars)}\n")
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    index = 0
    for number, samples in enumerate(tars):
        with tarfile.open(folder / f"test/{number}.tar", "w") as tar:
            for picture, suffix, annotation in samples:
                for ending, data in (("png", picture), (suffix, annotation.encode())):
                    info = tarfile.TarInfo(f"s{index:07d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                index += 1


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """A folder with a toy CLIP's run, data sets, and a suite of them."""
    folder = tmp_path_factory.mktemp("suite")
    clip_run.write_teacher(folder / "teacher")
    clip_run.write_classes(folder / "train", 1)
    clip_run.write_classes(folder / "val", 5, seed=50)
    recipe = clip_run.load(folder)
    cache.run(recipe)
    clip_run.finish(recipe, randomize(clip_run.Student(), 3))
    labelled = [(clip_run.picture(7 * n), "cls", str(n * n % 5)) for n in range(23)]  # no image of the last class
    texts = {
        "classnames": "\n".join(NAMES),
        "zeroshot_classification_templates": "\n".join(TEMPLATES).replace("{}", "{c}"),
    }
    write_layout(folder / "sets/wds_vtab-toys_test", [labelled[:13], labelled[13:]], **texts)
    captioned = [(clip_run.picture(900 + n), "txt", "\n".join(lines)) for n, lines in enumerate(CAPTIONS)]
    write_layout(folder / "sets/captions", [captioned], dataset_type="retrieval\n")
    suite = {
        "name": "clip_suite",
        "root": f"{folder}/sets",
        "folder": "wds_{}_test",
        "workers": 0,
        "batch": 4,
        "datasets": {
            "vtab/toys": {"metric": "F1-macro_all"},
            "mine": {
                "metric": "mean_per_class_recall",
                "images": {"name": "image_classes", "root": f"{folder}/val"},
                "classnames": NAMES,
                "templates": TEMPLATES,
            },
            "captions": {"metric": "mean_recall@1", "folder": "captions"},
        },
    }
    (folder / "suite.yaml").write_text(json.dumps(suite))
    return folder


def judged(folder: Path, *overrides: str) -> tuple[list, dict]:
    rows = evaluate.run(folder / "suite.yaml", folder / "run", ["trust=true", *overrides])
    return rows, json.loads((folder / "run/evaluation/suite.json").read_text())


class Plain:
    """open_clip's own functions, with a student's image tower or the teacher's."""

    def __init__(self, folder: Path, subject: str) -> None:
        name = f"local-dir:{folder / 'teacher'}"
        self.model, _, self.transform = open_clip.create_model_and_transforms(name)
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(name)
        self.weight = open_clip.build_zero_shot_classifier(self.model, self.tokenizer, NAMES, TEMPLATES)
        self.tower = self.model
        if subject == "student":
            self.tower = clip_run.Model(distill.load_student(folder / "run", trust=True), self.model)

    @torch.no_grad()
    def embed(self, picture: bytes) -> torch.Tensor:
        return self.tower.encode_image(self.transform(PIL.Image.open(io.BytesIO(picture)))[None], normalize=True)[0]

    def predict(self, pictures: list[bytes]) -> np.ndarray:
        return np.array([int((self.embed(picture) @ self.weight).argmax()) for picture in pictures])


@pytest.mark.parametrize("subject", ["student", "teacher"])
def test_the_figures_are_those_of_plain_loops_and_scikit_learn(ran, subject):
    rows, stored = judged(ran, "teacher=true")
    plain = Plain(ran, subject)
    labels = np.array([n * n % 5 for n in range(23)])
    predicted = plain.predict([clip_run.picture(7 * n) for n in range(23)])
    expected = f1_score(labels, predicted, average="macro", labels=np.unique(labels))
    named = {"dataset": "vtab/toys", "measure": "F1-macro_all"}
    assert value(rows, "main_metric", subject, **named) == pytest.approx(expected)
    assert value(rows, "top1", subject, dataset="vtab/toys") == np.mean(labels == predicted)

    paths = sorted((ran / "val").rglob("*.png"))
    labels = np.array([sorted(clip_run.CLASSES).index(path.parent.name) for path in paths])
    predicted = plain.predict([path.read_bytes() for path in paths])
    named = {"dataset": "mine", "measure": "mean_per_class_recall"}
    expected = balanced_accuracy_score(labels, predicted)
    assert value(rows, "main_metric", subject, **named) == pytest.approx(expected)

    texts = [text for lines in CAPTIONS for text in lines]
    own = [n for n, lines in enumerate(CAPTIONS) for _ in lines]
    with torch.no_grad():
        text = plain.model.encode_text(plain.tokenizer(texts), normalize=True)
    scores = torch.stack([plain.embed(clip_run.picture(900 + n)) for n in range(6)]) @ text.T
    by_image = np.mean([own[int(scores[n].argmax())] == n for n in range(6)])
    by_text = np.mean([int(scores[:, u].argmax()) == own[u] for u in range(len(own))])
    main = value(rows, "main_metric", subject, dataset="captions", measure="mean_recall@1")
    assert main == pytest.approx((by_image + by_text) / 2)
    assert value(rows, "text_retrieval", subject, dataset="captions", k=1) == by_image
    assert value(rows, "image_retrieval", subject, dataset="captions", k=1) == by_text
    assert {name: entry["images"] for name, entry in stored["datasets"].items()} == {
        "vtab/toys": 23, "mine": 30, "captions": 6,
    }  # fmt: skip


def test_the_average_is_over_the_data_sets_and_its_interval_combines_theirs(ran):
    rows, stored = judged(ran)
    assert rows[0]["metric"] == "average" and {row["subject"] for row in rows} == {"student"}
    main = [row for row in rows if row["metric"] == "main_metric"]
    assert len(main) == 3 and all(row["low"] <= row["value"] <= row["high"] for row in main)
    average = rows[0]
    assert (average["over"], average["count"]) == ("3 data sets", 3)
    assert average["value"] == pytest.approx(sum(row["value"] for row in main) / 3)
    below = sum((row["value"] - row["low"]) ** 2 for row in main) ** 0.5 / 3
    above = sum((row["high"] - row["value"]) ** 2 for row in main) ** 0.5 / 3
    assert (average["low"], average["high"]) == pytest.approx((average["value"] - below, average["value"] + above))
    assert stored["skipped"] == []


def test_single_images_are_stored_for_the_main_metric_alone(ran):
    changed = ["datasets.vtab/toys.metric=acc1", "datasets.captions.metric=text_retrieval_recall@1"]
    rows, stored = judged(ran, *changed)
    entries = {entry["dataset"]: entry for entry in stored["per_image"]}
    assert entries.keys() == {"vtab/toys", "captions"}  # a recall of classes has no value of an image
    for name, entry in entries.items():
        (row,) = [row for row in rows if row["metric"] == "main_metric" and row["dataset"] == name]
        assert {"metric": "main_metric", "measure": row["measure"]}.items() <= entry.items()
        assert sum(entry["sums"]) / len(entry["sums"]) == row["value"] and entry["counts"] == 1


def test_every_image_is_embedded_once_for_all_subjects(ran):
    count = []

    class Counting(clip_run.Student):
        def forward(self, image):
            count.append(len(image))
            return super().forward(image)

    recipe = clip_run.load(ran)
    suite = evaluate.load(ran / "suite.yaml").evaluator
    students = {"a": Counting().eval(), "b": clip_run.Student().eval()}
    rows, _ = suite.judge(recipe, students)
    assert sum(count) == 23 + 30 + 6 and {row["subject"] for row in rows} == {"a", "b"}


def test_a_missing_data_set_is_refused_before_anything_is_embedded_or_skipped_and_stated(ran, monkeypatch, caplog):
    monkeypatch.setattr(annotated, "embed", None)
    with pytest.raises(UserError, match="cars: .*wds_cars_test/test/nshards.txt does not exist; .*; missing=skip"):
        judged(ran, "datasets.cars.metric=acc1")
    monkeypatch.undo()
    rows, stored = judged(ran, "datasets.cars.metric=acc1", "missing=skip")
    assert rows[0]["over"] == "3 of 4 data sets" and stored["skipped"] == ["cars"] and "skips cars: " in caplog.text
    with pytest.raises(UserError, match="none of 3 data sets exists"):
        judged(ran, "root=nowhere", "datasets.mine.images.root=nowhere", "missing=skip")


def test_an_interrupted_suite_continues_after_its_last_data_set(ran, monkeypatch):
    whole, _ = judged(ran, "limit=5")
    embed, titles = annotated.embed, []

    def embed_until(data, models, device, title, *arguments):
        titles.append(title)
        if len(titles) == 3:
            raise KeyboardInterrupt
        return embed(data, models, device, title, *arguments)

    (ran / "run/evaluation/suite.json").unlink()
    monkeypatch.setattr(annotated, "embed", embed_until)
    with pytest.raises(KeyboardInterrupt):
        judged(ran, "limit=5")
    assert judged(ran, "limit=5")[0] == whole
    assert titles == ["vtab/toys (1 of 3)", "mine (2 of 3)", "captions (3 of 3)", "captions (3 of 3)"]


def test_a_stored_result_is_made_again_if_a_data_set_s_files_change(ran, monkeypatch):
    judged(ran, "limit=4")
    embed, titles = annotated.embed, []
    monkeypatch.setattr(annotated, "embed", lambda *arguments: titles.append(arguments[3]) or embed(*arguments))
    judged(ran, "limit=4")
    assert titles == []
    names = ran / "sets/wds_vtab-toys_test/classnames.txt"
    names.write_text("\n".join(NAMES[::-1]))
    judged(ran, "limit=4")
    assert len(titles) == 3
    names.write_text("\n".join(NAMES))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["datasets.mine.metric=acc2"], "datasets.mine.metric=acc2: unknown; give acc1, "),
        (["datasets.mine.folder=x"], "datasets.mine: has `folder` and `images`"),
        (["datasets.mine.templates=null"], "datasets.mine: `images` .* need `classnames`"),
        (["datasets.captions.classnames=imagenet"], "compares captions; remove classnames"),
        (["datasets.captions.metric=acc1"], "dataset_type.txt says retrieval, which has no metric=acc1"),
        (
            ["datasets.vtab/toys.metric=mean_recall@1"],
            "says zeroshot_classification, which has no metric=mean_recall@1",
        ),
        (["datasets.captions.metric=mean_recall@10"], "mean_recall@10 needs more targets than its 6 images"),
        (["datasets.mine.classnames=[a, b]"], r"6 class folders, but classnames=\[a, b\] has 2 names"),
        (["datasets.vtab/toys.classnames=[a, b, c]", "datasets.vtab/toys.metric=acc5"], "has 3 classes; use acc1"),
        (["datasets.vtab/toys.classnames=[a]"], "image 's0000001': has label 1, but the 1 class names"),
        (["datasets={}"], "datasets: none is named"),
        (["batch=0"], "batch=0: needs at least 1"),
    ],
)
def test_what_cannot_be_judged_is_a_one_line_error(ran, overrides, says):
    with pytest.raises(UserError, match=says) as error:
        judged(ran, *overrides)
    assert "\n" not in str(error.value)


def test_a_teacher_whose_weights_are_gone_is_refused(ran):
    recipe = clip_run.load(ran, "teacher.model=local-dir:nowhere")
    with pytest.raises(UserError, match="teacher=true: its weights nowhere do not exist"):
        evaluate.check(evaluate.load(ran / "suite.yaml", {"teacher": True}), recipe)
