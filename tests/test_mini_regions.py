"""The source of regions in photographs, and agreement with such regions: what each label, score and count means."""

import io

import numpy as np
import PIL.Image
import pytest
import torch

from fmdistill import evaluate, recipe
from fmdistill.images import build
from fmdistill.mini import region_agreement
from fmdistill.mini.region_agreement import RegionAgreement, judge_photograph
from fmdistill.mini.regions import Regions, segment
from fmdistill.mini.sam import sam_mini_student
from fmdistill.mini.scenes import decode_labels
from fmdistill.registry import UserError


def halves(height: int = 40, width: int = 60) -> np.ndarray:
    """Return a photograph uint8 (H, W, 3), its left half dark and its right half bright."""
    pixels = np.full((height, width, 3), 30, np.uint8)
    pixels[:, width // 2 :] = 220
    return pixels


def test_regions_follow_an_edge_and_cover_every_pixel():
    labels = segment(halves(), scale=100.0, sigma=0.8, smallest=50)
    assert set(np.unique(labels[:, :25])) == {labels[0, 0]} and set(np.unique(labels[:, 35:])) == {labels[0, -1]}
    assert labels.min() == 1 and labels[0, 0] != labels[0, -1]


def test_an_image_and_its_labels_are_of_one_crop_and_the_same_every_time():
    source = Regions(train=30, validation=8, size=96, shard_size=8)
    names = source.shards()
    assert len(names["train"]) == 4 and len(names["validation"]) == 1
    first, again = (list(source.read("train-001")) for _ in range(2))
    assert [image.data for image in first] == [image.data for image in again]
    sizes, regions = set(), []
    for image in first:
        labels = decode_labels(image.extra["labels.png"])
        with PIL.Image.open(io.BytesIO(image.data)) as picture:
            assert picture.size == (labels.shape[1], labels.shape[0])
            sizes.add(picture.size)
        assert labels.min() == 1
        regions.append(int(labels.max()))
        assert region_agreement.parts(labels == 1) == 1
    assert sizes == {(96, 96), (96, 64), (64, 96)} and len(set(regions)) > 3
    assert source.fetch("train-001", first[2].key).data == first[2].data


def test_photographs_of_a_folder_are_for_training_only(tmp_path):
    (tmp_path / "deep").mkdir()
    PIL.Image.fromarray(halves(300, 400)).save(tmp_path / "deep" / "mine.JPG")
    (tmp_path / "notes.txt").write_text("no photograph")
    source = Regions(train=26, validation=8, size=64, folder=str(tmp_path))
    names = source.identity()["photographs"]
    assert names["train"][-1] == "deep/mine.JPG" and len(names["train"]) == 13
    assert names["validation"] == ["chelsea", "coffee", "flower", "coins"]
    assert len({image.data for image in source.read("train-000")}) == 26


def test_wrong_settings_raise_before_any_work(tmp_path):
    for settings, message in (
        ({"folder": str(tmp_path)}, "folder=.*: contains no images"),
        ({"folder": str(tmp_path / "none")}, "folder=.*none: no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            Regions(folder=settings["folder"]).identity()
        with pytest.raises(UserError, match=message):
            evaluate.load("eval/photo_regions.yaml", settings)
    for settings, message in (
        ({"scale": [0, 5]}, r"images.scale=\[0.0, 5.0\]: expected smallest <= largest"),
        ({"sigma": [2, 1]}, r"images.sigma=\[2.0, 1.0\]: expected smallest"),
        ({"size": 4}, "images.size=4: expected at least 16"),
    ):
        with pytest.raises(UserError, match=message):
            build({"name": "regions", **settings})
    for settings, message in (
        ({"grid": 0}, "grid=0: needs at least 1"),
        ({"side": 8}, "side=8: needs at least 16"),
        ({"scales": []}, r"scales=\[\]: needs at least one"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.load("eval/photo_regions.yaml", settings)


def test_agreement_is_the_best_mask_with_the_region_at_any_scale_and_its_parts_are_counted(monkeypatch):
    """Planted masks: of each point one that fits its half but for two far specks, one of nothing, one of everything."""
    pixels = halves()

    def planted(student, pixels, xy_P2):
        right = np.arange(60)[None] >= 30
        masks = []
        for x, _ in xy_P2:
            fits = np.broadcast_to(right if x >= 30 else ~right, (40, 60)).copy()
            column = 5 if x >= 30 else 55
            fits[5, column] = fits[30, column] = True
            masks.append([np.zeros_like(fits), fits, np.ones_like(fits)])
        return np.array(masks)

    monkeypatch.setattr(region_agreement, "predict", planted)
    points = judge_photograph(RegionAgreement(grid=2, side=60, scales=(100.0, 1e9)), sam_mini_student("none"), pixels)
    assert [score.point for score in points] == [(15.0, 10.0), (45.0, 10.0), (15.0, 30.0), (45.0, 30.0)]
    # At the second scale the photograph is one region, which the third mask fits exactly.
    assert {(score.agreement, score.components) for score in points} == {(1.0, 1)}
    points = judge_photograph(RegionAgreement(grid=2, side=60, scales=(100.0,)), sam_mini_student("none"), pixels)
    assert {round(score.agreement, 6) for score in points} == {round(1200 / 1202, 6)}
    assert {score.components for score in points} == {3}


def test_masks_are_those_of_the_decoder_at_the_photograph_s_size():
    student = sam_mini_student("packaged").eval()
    pixels = halves(200, 300)
    masks = region_agreement.predict(student, pixels, np.array([[60.0, 100.0], [240.0, 100.0]]))
    assert masks.shape == (2, 3, 200, 300) and masks.dtype == bool
    assert masks[0, :, 100, 60].any() and masks[1, :, 100, 240].any()
    assert not np.array_equal(masks[0], masks[1])


def test_the_protocol_judges_the_validation_photographs_and_a_folder(tmp_path):
    PIL.Image.fromarray(halves(120, 90)).save(tmp_path / "mine.png")
    settings = recipe.load("recipes/mini/sam_mini_scenes.yaml")
    evaluator = RegionAgreement(grid=2, side=64, folder=str(tmp_path))
    rows, details = evaluator.judge(settings, {"student": sam_mini_student("packaged").eval()})
    assert [point["photograph"] for point in details["points"]][::4] == [
        "chelsea", "coffee", "flower", "coins", "mine.png"
    ]  # fmt: skip
    agreement = [row for row in rows if row["metric"] == "agreement"]
    assert agreement[0]["value"] == pytest.approx(np.mean([point["agreement"] for point in details["points"]]))
    assert agreement[0]["low"] < agreement[0]["value"] < agreement[0]["high"]
    assert [("low" in row, row.get("average")) for row in rows] == [(True, None), (True, "mean"), (False, "median")]
    assert {len(entry["images"]) for entry in details["per_image"]} == {5}
    with pytest.raises(UserError, match="region_agreement judges a promptable model"):
        evaluator.judge(settings, {"student": torch.nn.Linear(2, 2)})
