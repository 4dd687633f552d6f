"""Detector boxes: read as they are, counted if they cannot be used, refused if they are of another data set."""

import json

import pytest

from fmdistill.evaluate.detections import read
from fmdistill.registry import UserError

RIGHT = {"image_id": 7, "category_id": 1, "bbox": [1.5, 2, 10, 20.25], "score": 0.75}


def write(folder, content) -> str:
    path = folder / "boxes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_boxes_come_by_image_in_the_order_of_the_file(tmp_path):
    entries = [RIGHT, {**RIGHT, "image_id": 8}, {**RIGHT, "category_id": 3, "score": 1, "bbox": [0, 0, 0, 5]}]
    found = read(write(tmp_path, entries), [7, 8, 9], [1, 3])
    assert sorted(found.by_image) == [7, 8] and found.skipped == {}
    boxes = found.by_image[7]
    assert (boxes.categories, boxes.scores) == ([1, 3], [0.75, 1.0])
    assert boxes.xyxy_D4.tolist() == [[1.5, 2, 11.5, 22.25], [0, 0, 0, 5]]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"image_id": 70}, "of an image that is missing or not annotated"),
        ({"image_id": None}, "an id that is not a number"),
        ({"image_id": [7]}, "an id that is not a number"),
        ({"category_id": "1"}, "an id that is not a number"),
        ({"category_id": True}, "an id that is not a number"),
        ({"bbox": [1, 2, 3]}, "a bbox that is not four numbers"),
        ({"bbox": [1, 2, 3, "4"]}, "a bbox that is not four numbers"),
        ({"bbox": None}, "a bbox that is not four numbers"),
        ({"bbox": [1, 2, float("inf"), 4]}, "a bbox that is not finite"),
        ({"bbox": [1, 2, -3, 4]}, "a bbox of negative size"),
        ({"score": float("nan")}, "a score that is not finite"),
        ({"score": "high"}, "a score that is not a number"),
    ],
)
def test_an_entry_that_cannot_be_used_is_counted(tmp_path, change, reason):
    found = read(write(tmp_path, [RIGHT, {**RIGHT, **change}, {**RIGHT, **change}]), [7], [1])
    assert found.skipped == {reason: 2} and found.by_image[7].scores == [0.75]


def test_an_entry_without_a_part_is_counted(tmp_path):
    entries = [RIGHT, *({k: v for k, v in RIGHT.items() if k != name} for name in RIGHT), 5]
    assert read(write(tmp_path, entries), [7], [1]).skipped == {
        "no image_id": 1, "no category_id": 1, "no bbox": 1, "no score": 1, "not a mapping": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not a readable JSON"),
        ("[" * 100_000, "not a readable JSON"),
        ({"annotations": []}, "holds dict; expected a list of"),
        ([], "holds an empty list"),
        ([{**RIGHT, "image_id": 1}] * 3, "no box of an annotated image .3 x of an image that is missing"),
        ([RIGHT, {**RIGHT, "category_id": 0}], r"1 boxes of categories that the annotations do not have \(0\)"),
    ],
)
def test_a_file_of_another_kind_or_data_set_is_refused_in_a_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as error:
        read(write(tmp_path, content), [7], [1])
    assert "\n" not in str(error.value) and str(error.value).startswith(f"boxes={tmp_path}")


def test_classes_that_do_not_count_may_be_any(tmp_path):
    assert read(write(tmp_path, [{**RIGHT, "category_id": 99}]), [7], None).by_image[7].categories == [99]
