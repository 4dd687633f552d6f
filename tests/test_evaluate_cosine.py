"""The cosine evaluator against loops over tokens, on maps with padding and on vectors."""

import json
from pathlib import Path

import clip_run
import numpy as np
import pytest
import tiny
import torch
from nondegenerate import randomize

from fmdistill import cache, distill, evaluate, report
from fmdistill.cache.dataset import CachedImages
from fmdistill.evaluate import cosine
from fmdistill.evaluate.cosine import TeacherSimilarity
from fmdistill.evaluate.results import value
from fmdistill.evaluate.subjects import pooled
from fmdistill.registry import UserError

MIX = (
    "images={name: mix, sources: {photos: {name: photos, train: 12, validation: 5, size: 64, shard_size: 4}, "
    "scenes: {name: scenes, train: 12, validation: 3, size: 64, shard_size: 4, objects: [2, 3]}}}"
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """A folder with a finished toy SAM run on two sources."""
    folder = tmp_path_factory.mktemp("cosine")
    recipe = tiny.load(folder, MIX, "train.steps=8")
    cache.run(recipe)
    distill.run(recipe)
    (folder / "cosine.yaml").write_text("name: cosine\nbatch: 3\nworkers: 0\n")
    (folder / "grid.yaml").write_text("name: grid_miou\ngrids: [2]\n")
    return folder


def literal(a_Cgg: np.ndarray, b_Cgg: np.ndarray, rows: int, columns: int) -> tuple[float, float]:
    """Return the mean cosine and the mean squared difference of the first tokens, one by one."""
    cosines, squares = [], []
    for y in range(rows):
        for x in range(columns):
            a, b = a_Cgg[:, y, x].astype(np.float64), b_Cgg[:, y, x].astype(np.float64)
            cosines.append(a @ b / np.sqrt((a @ a) * (b @ b)))
            squares.append(np.mean((a - b) ** 2))
    return float(np.mean(cosines)), float(np.mean(squares))


def items(folder: Path, split: str) -> list[dict]:
    data = CachedImages(cache.open_cache(tiny.load(folder, MIX)), split)
    return [tiny.item(data, s, i) for s, shard in enumerate(data.shards) for i in range(len(shard.samples))]


def tokens(item: dict) -> tuple[int, int]:
    return -(-int(item["sizes"][0]) // 16), -(-int(item["sizes"][1]) // 16)


def test_maps_are_compared_over_their_valid_tokens(ran):
    rows = evaluate.run(ran / "cosine.yaml", ran / "run", ["trust=true"])
    opened, student = cache.open_cache(tiny.load(ran, MIX)), distill.load_student(ran / "run", trust=True)
    mean, count = np.zeros((32, 4, 4)), np.zeros((4, 4))
    for item in items(ran, "train"):
        h, w = tokens(item)
        mean[:, :h, :w] += item["outputs"]["sam.embedding"].numpy()[:, :h, :w]
        count[:h, :w] += 1
    assert count.min() > 0
    expected: dict[str, list[tuple[float, float]]] = {"student": [], "mean embedding": []}
    groups = []
    for item in items(ran, "validation"):
        teacher, size = item["outputs"]["sam.embedding"].numpy(), tokens(item)
        with torch.no_grad():
            output = student(opened.preprocess.normalize(item["pixels"][None], item["sizes"][None]))["embedding"][0]
        expected["student"].append(literal(output.numpy(), teacher, *size))
        expected["mean embedding"].append(literal(mean / count, teacher, *size))
        groups.append(item["shards"].partition("-")[0])
    assert any(tokens(item) != (4, 4) for item in items(ran, "validation")), "no image is padded"
    for name, pairs in expected.items():
        for place, metric in enumerate(("cosine", "mse")):
            each = np.array([pair[place] for pair in pairs])
            assert value(rows, metric, name) == pytest.approx(each.mean(), rel=1e-5)
            for group in ("photos", "scenes"):
                members = each[np.array(groups) == group]
                assert value(rows, metric, name, group=group) == pytest.approx(members.mean(), rel=1e-5)
    assert {row["count"] for row in rows} == {8, 5, 3}
    stored = json.loads((ran / "run/evaluation/cosine.json").read_text())
    assert len(stored["images"]) == 16 and stored["metrics"]["mse"]["better"] == "lower"


def test_the_figures_are_grid_miou_s_feature_figures(ran):
    rows = evaluate.run(ran / "cosine.yaml", ran / "run", ["trust=true", "limit=5", "floor=false", "batch=64"])
    other = evaluate.run(ran / "grid.yaml", ran / "run", ["trust=true", "images=5"])
    for metric in ("cosine", "mse"):
        assert value(rows, metric) == pytest.approx(value(other, metric), rel=1e-5)
    assert {row["subject"] for row in rows} == {"student"}


def test_a_trimmed_cache_has_the_same_floor(ran, tmp_path):
    trimmed = tiny.load(tmp_path, MIX, "cache.trim=true", "objective.embedding.padding=exclude")
    cache.run(trimmed)
    whole = cosine.mean_output(cache.open_cache(tiny.load(ran, MIX)), "embedding")
    torch.testing.assert_close(cosine.mean_output(cache.open_cache(trimmed), "embedding"), whole, rtol=1e-3, atol=1e-3)


def test_the_share_of_the_way_ends_at_the_perfect_value(ran):
    evaluate.run(ran / "cosine.yaml", ran / "run", ["trust=true"])
    rows = json.loads((ran / "run/evaluation/cosine.json").read_text())["rows"]
    blocks = report.text([str(ran / "run")]).split("Share of the way")[1:]  # one for each part of a wide table
    cells = [cell for block in blocks for cell in block.splitlines()[1].split()]
    shares = []
    for metric, end in (("cosine", 1.0), ("mse", 0.0)):
        floor = value(rows, metric, "mean embedding")
        shares.append(f"{100 * (value(rows, metric) - floor) / (end - floor):.2f}".replace("-", "−"))
    assert set(shares) <= set(cells)


def test_a_vector_has_a_single_cosine(tmp_path):
    clip_run.write_teacher(tmp_path / "teacher")
    clip_run.write_classes(tmp_path / "train", 2)
    clip_run.write_classes(tmp_path / "val", 1, seed=50)
    recipe = clip_run.load(tmp_path)
    cache.run(recipe)
    student = randomize(clip_run.Student(), 3).eval()
    rows, details = TeacherSimilarity(workers=0, batch=4).judge(recipe, {"student": student})
    opened = cache.open_cache(recipe)
    data = CachedImages(opened, "validation")
    for index, image in enumerate(details["images"][:4]):
        item = tiny.item(data, 0, index)
        with torch.no_grad():
            output = student(opened.preprocess.normalize(item["pixels"][None], item["sizes"][None]))["embedding"]
        teacher = item["outputs"]["clip.embedding"].numpy()[:, None, None]
        pair = literal(output.numpy()[0][:, None, None], teacher, 1, 1)
        assert (image["cosine"], image["mse"]) == pytest.approx(pair, rel=1e-5)
    assert {row["subject"] for row in rows} == {"student", "mean embedding"} and {row["count"] for row in rows} == {6}
    with pytest.raises(UserError, match=r"student: gives an embedding of \(48,\), the cache holds \(24,\)"):
        TeacherSimilarity(workers=0).judge(recipe, {"student": Wide().eval()})
    with pytest.raises(UserError, match="output=logits: not in .*Known: embedding"):
        TeacherSimilarity(output="logits").judge(recipe, {"student": student})
    with pytest.raises(UserError, match="this recipe has no cache"):
        TeacherSimilarity().check(clip_run.load(tmp_path, "cache=null"))


class Wide(clip_run.Student):
    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": super().forward(image)["embedding"].repeat(1, 2)}


def test_a_map_is_pooled_over_its_valid_tokens(ran):
    preprocess = cache.open_cache(tiny.load(ran, MIX)).preprocess
    output = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[64, 17], [30, 64]])
    mean = pooled(output, preprocess, sizes)
    torch.testing.assert_close(mean[0], output[0, :, :, :2].mean((1, 2)))
    torch.testing.assert_close(mean[1], output[1, :, :2].mean((1, 2)))
    assert pooled(output[:, :, 0, 0], preprocess, sizes) is not None
    with pytest.raises(UserError, match=r"a map of \[8, 8\] tokens: what is padding is known for \[4, 4\]"):
        pooled(torch.zeros(2, 5, 8, 8), preprocess, sizes)
    torch.testing.assert_close(
        pooled(output.repeat(1, 1, 2, 2), preprocess, torch.tensor([[64, 64], [64, 64]])), output.mean((2, 3))
    )
