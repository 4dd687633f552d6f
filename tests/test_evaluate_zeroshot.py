"""Zero-shot accuracy equals a plain open_clip loop's, image by image, and unsuitable settings are one-line errors."""

import dataclasses
import json
from pathlib import Path

import clip_run
import numpy as np
import open_clip
import PIL.Image
import pytest
import tiny
import torch
from nondegenerate import randomize
from sklearn.metrics import balanced_accuracy_score, f1_score

from fmdistill import cache, distill, evaluate
from fmdistill.cache.dataset import CachedImages
from fmdistill.evaluate import accuracy, clip_teacher, intervals, rarity, teacher_score, text_classifier
from fmdistill.evaluate.results import Row, value
from fmdistill.evaluate.zeroshot import Zeroshot
from fmdistill.registry import UserError

TEMPLATES = ["a photo of a {}.", "the {}!"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """A folder with a cached toy CLIP, a run, and protocols for its own images and for others."""
    folder = tmp_path_factory.mktemp("zeroshot")
    clip_run.write_teacher(folder / "teacher")
    clip_run.write_classes(folder / "train", 2)
    clip_run.write_classes(folder / "val", 7, seed=50)
    recipe = clip_run.load(folder)
    cache.run(recipe)
    clip_run.finish(recipe, randomize(clip_run.Student(), 3))
    shared = (
        f"name: zeroshot\nclassnames: {folder}/names.txt\ntemplates: {json.dumps(TEMPLATES)}\nworkers: 0\nbatch: 8\n"
    )
    (folder / "own.yaml").write_text(shared)
    (folder / "other.yaml").write_text(shared + "images: {name: image_classes, root: nowhere}\n")
    return folder


def judged(folder: Path, protocol: str, *overrides: str) -> tuple[list[Row], list[dict]]:
    rows = evaluate.run(folder / f"{protocol}.yaml", folder / "run", ["trust=true", *overrides])
    return rows, json.loads((folder / f"run/evaluation/{protocol}.json").read_text())["images"]


def plain_loop(folder: Path, tower: str) -> dict[str, tuple[int, list[int]]]:
    """Return {key: (label, classes, best first)} by open_clip's own functions alone, image by image."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder / 'teacher'}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder / 'teacher'}")
    names = [clip_run.CLASSES[name] for name in sorted(clip_run.CLASSES)]
    weight = open_clip.build_zero_shot_classifier(model, tokenizer, names, TEMPLATES)
    if tower == "student":
        model = clip_run.Model(distill.load_student(folder / "run", trust=True), model)
    predictions = {}
    for path in sorted((folder / "val").rglob("*.png")):
        with torch.no_grad(), PIL.Image.open(path) as image:
            logits = 100 * model.encode_image(preprocess(image)[None], normalize=True) @ weight
        label = sorted(clip_run.CLASSES).index(path.parent.name)
        predictions[f"{path.parent.name}/{path.name}"] = (label, logits[0].argsort(descending=True).tolist())
    return predictions


@pytest.mark.parametrize("tower", ["student", "teacher"])
def test_every_prediction_is_a_plain_open_clip_loop_s(ran, tower):
    rows, images = judged(ran, "own")
    expected = plain_loop(ran, tower)
    by_key = {image["key"]: image for image in images if image["subject"] == tower}
    assert by_key.keys() == expected.keys() and len(by_key) == 42
    assert {k: (r["label"], r["prediction"]) for k, r in by_key.items()} == {
        k: (label, best[0]) for k, (label, best) in expected.items()
    }
    assert len({image["prediction"] for image in by_key.values()}) > 1  # else the comparison is meaningless
    top1 = np.mean([best[0] == label for label, best in expected.values()])
    top5 = np.mean([label in best[:5] for label, best in expected.values()])
    assert value(rows, "top1", tower) == pytest.approx(top1) and value(rows, "top5", tower) == pytest.approx(top5)
    recalls = [np.mean([b[0] == lab for lab, b in expected.values() if lab == c]) for c in range(6)]
    assert value(rows, "mean_per_class_recall", tower) == pytest.approx(np.mean(recalls))


def test_other_images_are_given_on_the_command_line_and_have_no_teacher(ran):
    rows, _ = judged(ran, "other", f"images.root={ran}/val")
    own, _ = judged(ran, "own")
    assert {row["subject"] for row in rows} == {"student"} and {row["count"] for row in rows} == {42}
    assert rows == [row for row in own if row["subject"] == "student"]
    assert len(judged(ran, "other", f"images.root={ran}/val", "limit=9")[1]) == 9
    with pytest.raises(UserError, match="images.root=nowhere: no such folder"):
        judged(ran, "other")


def test_quartiles_split_the_images_by_the_teacher_s_own_similarity(ran):
    rows, images = judged(ran, "own", "quartiles=true", "seed=3")
    for subject in ("student", "teacher"):
        members = [image for image in images if image["subject"] == subject]
        sizes = np.bincount([image["quartile"] for image in members], minlength=5)[1:]
        assert sorted(sizes) == [10, 10, 11, 11]
        for number in range(1, 5):
            right = [image["prediction"] == image["label"] for image in members if image["quartile"] == number]
            assert value(rows, "top1", subject, quartile=f"q{number}") == pytest.approx(np.mean(right))
    assert judged(ran, "own", "quartiles=true", "seed=3")[0] == rows
    with pytest.raises(UserError, match="quartiles=true: they come from the teacher's cached"):
        judged(ran, "other", f"images.root={ran}/val", "quartiles=true")


def test_rarity_is_the_average_cosine_to_the_others_of_the_batch():
    rng = np.random.default_rng(0)
    common = rng.normal(size=(1, 8)) + 0.1 * rng.normal(size=(150, 8))
    rare = rng.normal(size=(50, 8))
    vectors = np.concatenate([common, rare])
    similarity = rarity.similarity(torch.tensor(vectors), seed=1)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    order = np.random.default_rng(1).permutation(200)
    for members in np.array_split(order, 3):
        for i in members[:5]:
            assert similarity[i] == pytest.approx(np.mean([unit[i] @ unit[j] for j in members if j != i]))
    quartile = rarity.quartiles(similarity)
    assert (quartile[150:] == 1).mean() > 0.9 and list(np.bincount(quartile)) == [0, 50, 50, 50, 50]
    assert similarity[quartile == 1].max() <= similarity[quartile == 2].min()


def test_the_text_classifier_is_stored_under_everything_it_depends_on(ran, monkeypatch):
    judged(ran, "own")
    before = set((ran / "cache/classifiers").iterdir())
    monkeypatch.setattr(open_clip, "build_zero_shot_classifier", None)  # a second call would fail
    judged(ran, "own")
    monkeypatch.undo()
    head = cache.open_cache(clip_run.load(ran)).head()
    names, prompts = text_classifier.class_names(f"{ran}/names.txt"), TEMPLATES
    digest = text_classifier._digest(head, names, prompts)
    assert ran / f"cache/classifiers/{digest}.safetensors" in before
    assert text_classifier._digest(head, names[::-1], prompts) != digest
    assert text_classifier._digest(head, names, prompts[:1]) != digest
    head.config["model_cfg"]["quick_gelu"] = False
    assert text_classifier._digest(head, names, prompts) != digest
    head.config["model_cfg"]["quick_gelu"] = True
    with torch.no_grad():
        head.text_model.ln_final.bias[0] += 1
    assert text_classifier._digest(head, names, prompts) != digest


def test_top5_needs_five_classes_and_recall_counts_classes_with_images():
    best = np.array([[0, 1, 2], [0, 1, 2], [1, 0, 2], [0, 2, 1]])
    metrics = accuracy.measure(best, np.array([0, 0, 0, 2]), 3)
    assert metrics == {"top1": 0.5, "mean_per_class_recall": pytest.approx((2 / 3 + 0) / 2)}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["classnames=none.txt"], "classnames=none.txt: no such file here or in the package; give imagenet, or"),
        (["classnames={ran}/gap.txt"], "gap.txt: line 2 is empty"),
        (["classnames={ran}/short.txt"], "6 class folders, but classnames=.*short.txt has 2 names"),
        (["classnames=imagenet"], "6 class folders, but classnames=imagenet has 1000 names"),
        (["templates=none.txt"], "templates=none.txt: no such file"),
        (["templates={ran}/short.txt"], r"templates=.*short.txt: 'owl' needs \{\} once"),
        (["images.root={ran}/flat"], "flat: contains no class folders"),
        (["images.name=folder", "images.root={ran}/val", "images.validation=0.5"], "has no label; zeroshot needs"),
        (["images.name=photos", "images.train=1", "images.validation=0"], "no validation images"),
        (["batch=0"], "batch=0: needs at least 1"),
        (["limit=0"], "limit=0: needs at least 1"),
        (["images.name=imageclasses"], "Did you mean 'image_classes'"),
    ],
)
def test_what_cannot_be_judged_is_a_one_line_error(ran, overrides, says):
    (ran / "short.txt").write_text("owl\nfox\n")
    (ran / "gap.txt").write_text("owl\n\nfox\n")
    (ran / "flat").mkdir(exist_ok=True)
    root = [] if any("images." in override for override in overrides) else [f"images.root={ran}/val"]
    with pytest.raises(UserError, match=says) as error:
        judged(ran, "other", *root, *(override.format(ran=ran) for override in overrides))
    assert "\n" not in str(error.value)


NAMES = ["owl", "chat sauvage", "caf\xe9"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_names_and_templates_are_read_with_a_byte_order_mark_and_any_line_end(tmp_path, encoding, end):
    (tmp_path / "names.txt").write_bytes(end.join(NAMES).encode(encoding))
    (tmp_path / "prompts.txt").write_bytes((end.join(f"{{c}}, {name}" for name in NAMES) + end).encode(encoding))
    assert text_classifier.class_names(str(tmp_path / "names.txt")) == NAMES
    assert text_classifier.templates(str(tmp_path / "prompts.txt")) == [f"{{}}, {name}" for name in NAMES]


@pytest.mark.parametrize(
    ("encoding", "says"), [("latin-1", "Latin-1 or another 8-bit"), ("utf-16", "UTF-16"), ("utf-32", "UTF-32")]
)
def test_names_and_templates_in_another_encoding_are_an_error_that_names_file_and_encoding(tmp_path, encoding, says):
    path = tmp_path / "names.txt"
    path.write_bytes("\n".join(f"{{}} {name}" for name in NAMES).encode(encoding))
    for read, setting in ((text_classifier.class_names, "classnames"), (text_classifier.templates, "templates")):
        with pytest.raises(UserError, match=f"^{setting}={path}: not UTF-8 .*{says}") as error:
            read(str(path))
        assert "\n" not in str(error.value)


def test_imagenet_s_folders_must_be_its_wnids(tmp_path):
    from timm.data.imagenet_info import ImageNetInfo

    from fmdistill.images import build

    wnids = ImageNetInfo("imagenet-1k").label_names()
    for wnid in wnids:
        (tmp_path / "val" / wnid).mkdir(parents=True)
    images = build({"name": "image_classes", "root": str(tmp_path / "val")})
    text_classifier.check_classes(images, "imagenet", 1000)
    assert len(text_classifier.class_names("imagenet")) == 1000
    (tmp_path / "val" / wnids[500]).rename(tmp_path / "val" / "n99999999")
    images = build({"name": "image_classes", "root": str(tmp_path / "val")})
    with pytest.raises(UserError, match=f"class folder 500 is '{wnids[501]}', ImageNet-1k's is '{wnids[500]}'"):
        text_classifier.check_classes(images, "imagenet", 1000)


def test_folders_that_are_numbers_fit_the_names_if_each_has_one(tmp_path):
    from fmdistill.images import build

    for number in (0, 2, 10, 999):
        (tmp_path / "val" / str(number)).mkdir(parents=True)
    images = build({"name": "image_classes", "root": str(tmp_path / "val")})
    text_classifier.check_classes(images, "imagenet", 1000)  # as ImageNetV2's, some may be missing
    with pytest.raises(
        UserError, match="class folder '10' is a label, but classnames=names.txt has 10 names, .* 0 to 9"
    ):
        text_classifier.check_classes(images, "names.txt", 10)


def test_templates_are_open_clip_s_and_clip_benchmark_s_files_work(tmp_path):
    prompts = text_classifier.templates("openai")
    assert [t.format("x") for t in prompts] == [t("x") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert len(prompts) == 80
    assert len(text_classifier.templates("simple")) == 7
    (tmp_path / "t.txt").write_text("a photo of {c}.\nthe {}\n")
    assert text_classifier.templates(str(tmp_path / "t.txt")) == ["a photo of {}.", "the {}"]
    with pytest.raises(UserError, match="the list is empty"):
        text_classifier.templates([])


def test_a_sam_run_has_no_text_tower_and_a_clip_run_no_masks(ran, tmp_path):
    sam = tiny.load(tmp_path, "train.steps=1")
    cache.run(sam)
    clip_run.finish(sam, tiny.Student())
    with pytest.raises(UserError, match="of the family 'sam' and has no text tower; zeroshot needs") as error:
        evaluate.run(ran / "own.yaml", sam.out, ["trust=true"])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="grid_miou: needs a run distilled from a cached SAM; .* teacher is open_clip"):
        evaluate.run("eval/sam_grid_demo.yaml", ran / "run", ["trust=true"])
    bare = dataclasses.replace(clip_run.load(ran), cache=None, teacher=None)
    with pytest.raises(UserError, match="has no text tower, and its recipe no cache"):
        evaluate.load(ran / "own.yaml").evaluator.judge(bare, {"student": clip_run.Student()})


class Wide(clip_run.Student):
    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": super().forward(image)["embedding"].repeat(1, 2)}


@pytest.mark.parametrize(
    ("student", "says"),
    [
        (Wide(), "student: gives embeddings of 48 numbers, the texts have 24"),
        (tiny.Student(), r"gives an embedding of \(32, 2, 2\) for an image; this protocol"),
    ],
)
def test_an_unsuitable_student_is_a_one_line_error(ran, student, says):
    with pytest.raises(UserError, match=says):
        evaluate.load(ran / "own.yaml").evaluator.judge(clip_run.load(ran), {"student": student})


def test_the_teacher_s_own_score_is_logged_from_the_cache(ran, caplog):
    caplog.set_level("INFO")
    rows = teacher_score.judge_teacher(clip_run.load(ran), [evaluate.load(ran / "own.yaml").evaluator])
    expected = plain_loop(ran, "teacher")
    assert value(rows, "top1", "teacher") == pytest.approx(
        np.mean([best[0] == label for label, best in expected.values()])
    )
    assert "the teacher, from the cache: zero-shot top1 " in caplog.text and "(42 images" in caplog.text
    assert "below twice chance" in caplog.text and "QuickGELU" in caplog.text  # its weights are random

    caplog.clear()
    assert teacher_score.judge_teacher(clip_run.load(ran)) == []
    assert "the teacher is not scored" in caplog.text and "no zeroshot protocol names their classes" in caplog.text
    caplog.clear()
    assert clip_teacher.judge_teacher(clip_run.load(ran), [Zeroshot()]) == []
    assert "not scored zero-shot: images.root=" in caplog.text and "1000 names" in caplog.text


def test_runs_of_one_cache_are_judged_together(ran):
    other = clip_run.load(ran, f"out={ran}/second")
    clip_run.finish(other, randomize(clip_run.Student(), 4))
    evaluate.run_together(ran / "own.yaml", [ran / "run", ran / "second"], trust=True)
    stored = json.loads((ran / "second/evaluation/own.json").read_text())
    for part in ("rows", "images"):
        assert {entry["subject"] for entry in stored[part]} == {"student", "teacher"}
    assert stored["rows"] == evaluate.run(ran / "own.yaml", ran / "second", ["trust=true"])


def test_names_and_templates_may_be_lists_also_on_the_command_line(ran):
    assert text_classifier.class_names(["cat", " dog "]) == text_classifier.class_names("[cat, dog]") == ["cat", "dog"]
    assert text_classifier.templates("['a {}', 'the {c}']") == ["a {}", "the {}"]
    names = json.dumps([clip_run.CLASSES[name] for name in sorted(clip_run.CLASSES)])
    assert judged(ran, "own", f"classnames={names}")[0] == judged(ran, "own")[0]
    with pytest.raises(UserError, match="classnames: the list is empty, or has an entry that is no text"):
        text_classifier.class_names("[1, 2]")


def test_the_logit_scale_changes_probabilities_and_no_ranking(ran):
    rows, _ = judged(ran, "own", "scales=[1,50]")
    assert [row for row in rows if "scale" not in row] == judged(ran, "own")[0]
    plain = {scale: [] for scale in (1.0, 50.0)}
    opened = cache.open_cache(clip_run.load(ran))
    names = [clip_run.CLASSES[name] for name in sorted(clip_run.CLASSES)]
    weight = open_clip.build_zero_shot_classifier(opened.head().text_model, opened.head().tokenizer, names, TEMPLATES)
    data = CachedImages(opened, "validation")
    for shard, count in enumerate(data.counts):
        for index in range(count):
            item = tiny.item(data, shard, index)
            cosine = torch.nn.functional.normalize(item["outputs"]["clip.embedding"], dim=0) @ weight
            for scale, values in plain.items():
                share = torch.exp(scale * cosine) / torch.exp(scale * cosine).sum()
                values.append((float(share.max()), -float(share[item["label_values"]].log())))
    for scale, values in plain.items():
        confidence, loss = np.mean(values, axis=0)
        assert value(rows, "confidence", "teacher", scale=scale) == pytest.approx(confidence, rel=1e-4)
        assert value(rows, "log_loss", "teacher", scale=scale) == pytest.approx(loss, rel=1e-4)
    with pytest.raises(UserError, match=r"scales=\[0.0\]: 0.0 is no factor of a cosine"):
        Zeroshot(scales=(0.0,))


def test_the_interval_of_a_mean_over_classes_scores_each_resample_of_the_images(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 40)
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 4, 30), rng.integers(0, 4, 30)
    predicted[:15] = labels[:15]
    for metric, measure in (
        (accuracy.RECALL, balanced_accuracy_score),
        (accuracy.F1, lambda y, p: f1_score(y, p, average="macro", labels=np.unique(y))),
    ):
        (row,) = accuracy.class_rows({"student": predicted[:, None]}, labels, 5, (metric,))
        assert row["value"] == pytest.approx(measure(labels, predicted))
        scores = []
        for weights in np.concatenate(list(intervals.resamples(30))):
            chosen = np.repeat(np.arange(30), weights.astype(int))
            scores.append(measure(labels[chosen], predicted[chosen]))
        assert (row["low"], row["high"]) == pytest.approx(intervals.ends(np.array(scores), 30))
