"""Annotations in every format name the same instances, and whatever is wrong with them is a line or a counted skip."""

import copy
import io
import json
from collections import Counter
from pathlib import Path

import annotated_toys
import numpy as np
import PIL.Image
import pytest
import tiny
from segment_anything import SamPredictor
from torch import nn

from fmdistill.evaluate import truth
from fmdistill.evaluate.masks import to_rle
from fmdistill.evaluate.segmentation import decode_segmentation
from fmdistill.evaluate.segmenters import SegmentedImage, Segmenters
from fmdistill.evaluate.truth import datasets
from fmdistill.evaluate.truth.instances import JoinedTruth
from fmdistill.images import Encoded
from fmdistill.registry import UserError


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("truth")
    annotated_toys.write(folder)
    return folder


def image(name: str, original: tuple[int, int], extra: dict[str, bytes] | None = None) -> SegmentedImage:
    shard, _, key = name.partition("/")
    return SegmentedImage(key, shard, "images", Encoded(key, b"", extra=extra or {}), original, {})


def joined(toys: Path, name: str = "coco", annotations: str | None = None, keys=None, **settings) -> JoinedTruth:
    names = [f"train-all/{i:012d}.png" for i in range(4)] if keys is None else keys
    return truth.build({"name": name, **settings}, annotations or str(toys / "coco.json")).join(names)


def sizes(toys: Path) -> list[tuple[int, int]]:
    return [(r["height"], r["width"]) for r in json.loads((toys / "coco.json").read_text())["images"]]


def changed(toys: Path, tmp_path: Path, change) -> str:
    coco = json.loads((toys / "coco.json").read_text())
    change(coco)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(coco))
    return str(path)


def lvis(coco: dict) -> None:
    for number, record in enumerate(coco["images"]):
        folder = ("train2017", "val2017")[number % 2]
        record["coco_url"] = f"http://images.cocodataset.org/{folder}/{record.pop('file_name')}"
        record |= {"neg_category_ids": [7], "not_exhaustive_category_ids": [1]}
    for number, category in enumerate(coco["categories"]):
        category["frequency"] = "rf"[number]


def test_every_format_names_the_same_instances(toys, tmp_path):
    coco = json.loads((toys / "coco.json").read_text())
    formats = {
        "coco": joined(toys),
        "lvis": joined(toys, "lvis", changed(toys, tmp_path, lvis)),
        "sa1b": joined(toys, "sa1b", str(toys / "images")),
        "labels": joined(toys, "labels", str(toys / "labels")),
    }
    for number, (original, record) in enumerate(zip(sizes(toys), coco["images"], strict=True)):
        own = [a for a in coco["annotations"] if a["image_id"] == record["id"]]
        with PIL.Image.open(toys / f"labels/{number:012d}.png") as picture:
            labels = np.asarray(picture)
        for name, truths in formats.items():
            assert truths.skipped == () and len(truths.images) == 4
            annotated = truths.of(image(truths.images[number], original))
            assert annotated.skipped == () and len(annotated.instances) == len(own)
            for value, instance, stated in zip(np.unique(labels)[1:], annotated.instances, own, strict=True):
                assert (instance.mask(original) == (labels == value)).all()
                assert list(instance.box) == stated["bbox"] and instance.area == stated["area"]
                assert instance.crowd == (name != "labels" and bool(stated["iscrowd"]))
                assert instance.point == (None if name == "labels" else tuple(stated["point_coords"][0]))
                assert instance.category == (stated["category_id"] if name in ("coco", "lvis") else None)
    of_lvis, of_coco = (formats[name].of(image(formats[name].images[0], sizes(toys)[0])) for name in ("lvis", "coco"))
    assert (of_lvis.negative, of_lvis.not_exhaustive, of_lvis.image_id) == ({7}, {1}, 10)
    assert (of_coco.negative, of_coco.not_exhaustive, of_coco.image_id) == (set(), set(), 10)
    assert {n: tuple(c) for n, c in formats["lvis"].categories.items()} == {1: ("a", "r"), 7: ("b", "f")}
    assert formats["coco"].stated == (4, len(coco["annotations"]))


def test_columns_beside_an_image_are_read_without_files(toys):
    name, original = "validation-000/a", sizes(toys)[0]
    columns = {
        "labels.png": (toys / f"labels/{0:012d}.png").read_bytes(),
        "json": (toys / f"images/{0:012d}.json").read_bytes(),
    }
    expected = joined(toys).of(image(f"train-all/{0:012d}.png", original))
    for kind in ("labels", "sa1b"):
        annotated = truth.build({"name": kind}).join([name]).of(image(name, original, columns))
        assert [i.area for i in annotated.instances] == [i.area for i in expected.instances]
        without = truth.build({"name": kind}).join([name]).of(image(name, original))
        assert without.instances == () and [skip.reason for skip in without.skipped] == ["image not annotated"]


def test_images_and_annotations_are_joined_by_name_and_what_has_no_partner_is_counted(toys, tmp_path):
    keys = ["a/000000000000", "b/sub/000000000002.jpeg", "b/other.png"]
    truths = joined(toys, keys=keys)
    assert list(truths.images) == keys[:2]
    assert truths.of(image(keys[1], sizes(toys)[2])).image_id == 12
    assert Counter(skip.reason for skip in truths.skipped) == {"annotated image missing": 2, "image not annotated": 1}
    assert "image 11, 000000000001.jpg" in [skip.place for skip in truths.skipped]
    url = changed(
        toys,
        tmp_path,
        lambda coco: (lvis(coco), coco["images"][1].update(coco_url="http://x/val2017/000000000000.jpg")),
    )
    folders = joined(toys, "lvis", url, ["s/val2017/000000000000.jpg", "s/train2017/000000000000.jpg"])
    assert [
        folders.of(image(name, sizes(toys)[i])).image_id for name, i in zip(folders.images, (1, 0), strict=True)
    ] == [11, 10]


def spoil(coco: dict, number: int, **values) -> None:
    coco["annotations"][number].update(values)


@pytest.mark.parametrize(
    ("change", "reason", "place"),
    [
        (lambda c: spoil(c, 2, id=1), "annotation id repeated", "annotation 1"),
        (lambda c: spoil(c, 1, image_id=99), "annotation of an unknown image", "annotation 2 is of image 99"),
        (lambda c: spoil(c, 1, category_id=5), "annotation of an unknown category", "annotation 2 is of category 5"),
        (lambda c: spoil(c, 1, bbox=[1, 2, 3]), "annotation malformed", "annotation 2: not enough values"),
        (lambda c: spoil(c, 1, bbox=[1, 2, float("nan"), 4]), "annotation malformed", "annotation 2: its box"),
        (lambda c: spoil(c, 1, area=float("inf")), "annotation malformed", "is not a size"),
        (lambda c: spoil(c, 1, bbox=[1, 2, -3, 4]), "annotation malformed", "is not a size"),
        (lambda c: spoil(c, 1, point_coords=[["x", 1]]), "annotation malformed", "could not convert string"),
        (lambda c: c["annotations"][1].pop("area"), "annotation malformed", "annotation 2: has no 'area'"),
        (lambda c: c["annotations"].insert(1, 5), "annotation malformed", "annotation 1: 'int' object"),
        (lambda c: c["annotations"].insert(1, None), "annotation malformed", "annotation 1: 'NoneType' object"),
    ],
)
def test_an_annotation_that_cannot_be_used_is_a_counted_skip(toys, tmp_path, change, reason, place):
    before = joined(toys).of(image(f"train-all/{0:012d}.png", sizes(toys)[0]))
    truths = joined(toys, annotations=changed(toys, tmp_path, change))
    (skip,) = truths.skipped
    assert skip.reason == reason and place in skip.place and "\n" not in skip.place
    after = truths.of(image(f"train-all/{0:012d}.png", sizes(toys)[0]))
    assert len(before.instances) - len(after.instances) == (not place.startswith("annotation 1: '"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("annotations"), "not COCO's JSON of instances: has no 'annotations'"),
        (lambda c: c.update(images={}), "its images are a dict, expected a list"),
        (lambda c: c.update(images=[]), "lists no images"),
        (lambda c: c["images"][1].update(id=10), "image id 10 occurs twice"),
        (lambda c: c["images"][1].update(id="x"), "image 'x' has no number as id"),
        (
            lambda c: c["images"][1].update(file_name=3),
            "image 11 has no number as id, or no text as file_name|its images",
        ),
        (lambda c: c["images"][1].pop("file_name"), "its images cannot be read: has no 'coco_url'"),
        (lambda c: c["images"][1].update(height="9"), "image 11 has the height '9'"),
        (lambda c: c["images"].append(7), "its images cannot be read"),
        (lambda c: c["categories"][1].update(id=1), "category id 1 occurs twice"),
        (lambda c: c["categories"].append("x"), "its categories cannot be read"),
        (lambda c: [r.update(file_name=f"x{r['id']}.jpg") for r in c["images"]], "annotates none of the 4 images"),
        (lambda c: c["images"][1].update(file_name="b/000000000000.jpg"), "2 of its images have the name"),
    ],
)
def test_annotations_that_cannot_be_joined_are_one_line(toys, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as caught:
        joined(toys, annotations=changed(toys, tmp_path, change))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("annotations=")


def test_malformed_files_are_one_line(toys, tmp_path):
    bad = tmp_path / "bad.json"
    for text in ("", "[1", "[" * 100_000, "3", '{"images": 3}'):
        bad.write_text(text)
        with pytest.raises(UserError, match="annotations=.*: ") as caught:
            joined(toys, annotations=str(bad))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    with pytest.raises(UserError, match="no such file; name COCO's JSON"):
        joined(toys, annotations=str(tmp_path / "none.json"))
    for kind in ("sa1b", "labels"):
        with pytest.raises(UserError, match="no such folder"):
            joined(toys, kind, str(tmp_path / "none"))
        with pytest.raises(UserError, match="has a file for none of the 4 images"):
            joined(toys, kind, str(tmp_path))
    with pytest.raises(UserError, match="category 1 has the frequency None, not r, c or f"):
        joined(toys, "lvis")
    with pytest.raises(UserError, match="'.*000.png' may be 'b/000000000000.jpg' or|000000000000.jpg' may be"):
        joined(toys, keys=["s/a/000000000000.png", "s/b/000000000000.png"])
    with pytest.raises(UserError, match="truth.name: unknown name 'cocoo'. Did you mean 'coco'"):
        joined(toys, "cocoo")
    with pytest.raises(UserError, match="truth.grid=0"):
        truth.build({"name": "teacher", "grid": 0}).check()


def test_damaged_images_annotations_and_maps_are_counted_skips(toys, tmp_path):
    name, original = "validation-000/a", sizes(toys)[0]
    turned = image(f"train-all/{0:012d}.png", original[::-1] if original[0] != original[1] else (original[0], 9))
    (skip,) = joined(toys).of(turned).skipped
    assert skip.reason == "image of another size" and str(list(original)) in skip.place

    def of(kind: str, data: bytes) -> list[str]:
        column = {"sa1b": "json", "labels": "labels.png"}[kind]
        annotated = truth.build({"name": kind}).join([name]).of(image(name, original, {column: data}))
        return [skip.reason for skip in annotated.skipped]

    assert of("sa1b", b"{") == of("sa1b", b"[]") == of("sa1b", b'{"annotations": 3}') == ["annotations malformed"]
    assert of("sa1b", b'{"annotations": [3]}') == ["annotation malformed"]
    assert of("labels", b"PNG") == ["annotations malformed"]
    rgb = io.BytesIO()
    PIL.Image.new("RGB", original[::-1]).save(rgb, "PNG")
    assert of("labels", rgb.getvalue()) == ["annotations malformed"]
    small = io.BytesIO()
    PIL.Image.new("L", (3, 4)).save(small, "PNG")
    assert of("labels", small.getvalue()) == ["image of another size"]
    instance = joined(toys).of(image(f"train-all/{0:012d}.png", original)).instances[1]
    with pytest.raises(ValueError, match="a mask of size"):
        instance.mask((original[0] + 1, original[1]))


def test_an_empty_category_and_an_image_without_instances_are_no_fault(toys, tmp_path):
    def change(coco):
        coco["categories"].append({"id": 9, "name": "empty"})
        coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] != 11]

    truths = joined(toys, annotations=changed(toys, tmp_path, change))
    assert truths.skipped == () and truths.categories[9].name == "empty"
    assert truths.of(image(f"train-all/{1:012d}.png", sizes(toys)[1])).instances == ()


def test_a_published_data_set_is_recognised_by_its_numbers(toys):
    truths = joined(toys)
    datasets.check_whole(None, truths)
    with pytest.raises(
        UserError, match="dataset=coco_val2017: has 5000 images and 36781 annotations, these .* add datas"
    ):
        datasets.check_whole("coco_val2017", truths)
    with pytest.raises(UserError, match="dataset=coco: unknown. Known: coco_val2017"):
        datasets.check_name("coco")
    whole = JoinedTruth(truths.images, truths.of, (), {}, datasets.DATASETS["coco_val2017"])
    datasets.check_whole("coco_val2017", whole)
    missing = joined(toys, keys=["a/000000000000"])
    with pytest.raises(UserError, match="3 of its 5000 images are missing, image 11"):
        datasets.check_whole("coco_val2017", JoinedTruth(whole.images, whole.of, missing.skipped, {}, whole.stated))


def test_the_teacher_s_masks_are_those_of_the_predictor(tmp_path):
    recipe = tiny.load(tmp_path, "teacher.exact=true")
    images = {"name": "photos", "train": 1, "validation": 1, "size": 64}
    student: nn.Module = tiny.Student()
    opened = Segmenters.open(recipe, {"student": student}, images, teacher=True)
    (segmented,) = opened.images()
    annotated = truth.build({"name": "teacher", "grid": 3}).join(opened.names).of(segmented)
    predictor = SamPredictor(tiny.teacher(exact=True).sam)
    height, width = segmented.original
    predictor.features, predictor.is_image_set = segmented.segmenters["teacher"].embedding[None], True
    predictor.original_size, predictor.input_size = segmented.original, segmented.segmenters["teacher"].resized
    by_id = {instance.id: instance for instance in annotated.instances}
    for number in range(9):
        point = np.array([[(number % 3 + 0.5) / 3 * width, (number // 3 + 0.5) / 3 * height]])
        masks, predicted, _ = predictor.predict(point, np.array([1]))
        best = masks[predicted.argmax()]
        if not best.any():
            assert number not in by_id
            continue
        assert (by_id[number].mask((height, width)) != best).sum() <= 2  # logits a rounding error away from 0
        assert by_id[number].point == pytest.approx(tuple(point[0])) and by_id[number].area == pytest.approx(
            best.sum(), abs=2
        )
    assert len(by_id) >= 3
    without = SegmentedImage(segmented.key, segmented.shard, "images", segmented.encoded, segmented.original, {})
    with pytest.raises(UserError, match="the teacher is not at hand"):
        truth.build({"name": "teacher"}).join([]).of(without)


def test_rle_as_text_and_as_list_are_one_mask(toys):
    mask = np.zeros((7, 9), bool)
    mask[2:5, 3:] = True
    coco = copy.deepcopy(annotated_toys.listed(mask))
    assert coco["counts"][0] == 23 and to_rle(mask)["size"] == coco["size"]
    assert (decode_segmentation(coco, (7, 9)) == decode_segmentation(to_rle(mask), (7, 9))).all()
