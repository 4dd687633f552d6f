"""The cached teacher's masks against SA-1B's annotations: equal masks score one, malformed ones are reported."""

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tiny
from pycocotools import mask as coco
from segment_anything import SamPredictor

from fmdistill import cache, pipeline
from fmdistill.evaluate.masks import to_rle
from fmdistill.evaluate.sa1b import Sa1b, annotated_shards, judge_teacher
from fmdistill.registry import UserError

SIZES = [(48, 72), (80, 60), (64, 64)]
POINTS = [[10.5, 8.0], [30.0, 40.5], [50.25, 20.0], [5.0, 44.0]]


def jpeg(seed: int, size: tuple[int, int]) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((size[1], size[0]), PIL.Image.Resampling.NEAREST).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def annotation(mask: np.ndarray, point: list[float]) -> dict:
    """Return one of SA-1B's annotations."""
    rows, columns = np.nonzero(mask)
    box = [0, 0, 0, 0]
    if len(rows):
        box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    return {
        "segmentation": to_rle(mask),
        "bbox": [float(v) for v in box],
        "area": int(mask.sum()),
        "predicted_iou": 0.9,
        "point_coords": [point],
        "stability_score": 0.95,
        "crop_box": [0.0, 0.0, float(mask.shape[1]), float(mask.shape[0])],
        "id": 1,
    }


def described(data: bytes, annotations: list) -> bytes:
    width, height = PIL.Image.open(io.BytesIO(data)).size
    image = {"image_id": 1, "width": width, "height": height, "file_name": "sa_1.jpg"}
    return json.dumps({"image": image, "annotations": annotations}).encode()


def teacher_masks(data: bytes, choice: str = "picked") -> bytes:
    """Return SA-1B's JSON of the masks that segment_anything's own predictor makes with the toy teacher."""
    predictor = SamPredictor(tiny.teacher().sam)
    predictor.set_image(np.asarray(PIL.Image.open(io.BytesIO(data))))
    annotations = []
    for point in POINTS:
        masks, predicted, _ = predictor.predict(np.array([point]), np.array([1]), multimask_output=True)
        order = np.argsort(predicted)
        annotations.append(annotation(masks[order[-1 if choice == "picked" else 0]], point))
    return described(data, annotations)


def noise_masks(data: bytes) -> bytes:
    rng = np.random.default_rng(7)
    width, height = PIL.Image.open(io.BytesIO(data)).size
    return described(data, [annotation(rng.random((height, width)) < 0.05, point) for point in POINTS])


def job(folder: Path, columns: dict[str, bytes] | None = None, make=teacher_masks, *overrides: str):
    """Return a recipe of two tars named as SA-1B's; `columns` replaces the JSON of some validation images."""
    number = 0
    for name, count in (("sa_000020", 8), ("sa_000021", 3)):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for _ in range(count):
                number += 1
                data = jpeg(number, SIZES[number % 3])
                text = make(data) if name == "sa_000021" else b'{"annotations": []}'
                text = (columns or {}).get(f"sa_{number}", text)
                for member, content in ((f"./sa_{number}.jpg", data), (f"./sa_{number}.json", text)):
                    if content is not None:
                        info = tarfile.TarInfo(member)
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    images = (f"images.root={folder}", "images.train=[sa_000020.tar]", "images.validation=[sa_000021.tar]")
    return tiny.load(folder, "images.name=tar", "teacher.exact=true", *images, *overrides)


DEFAULT = Sa1b()


def judged(recipe, protocol: Sa1b = DEFAULT) -> dict[str, float]:
    """Return the values by mask, or by metric if there is no mask."""
    cache.run(recipe)
    return {row.get("mask", row["metric"]): row["value"] for row in judge_teacher(recipe, protocol=protocol)}


def test_the_teacher_s_own_masks_score_one_and_are_reported(tmp_path, caplog):
    with caplog.at_level("INFO"):
        metrics = judged(job(tmp_path))
    assert metrics["picked"] == pytest.approx(1, abs=1e-3) and metrics["best"] >= metrics["picked"]
    assert (metrics["annotations"], metrics["images"], metrics["skipped"]) == (12, 3, 0)
    message = (
        "the teacher scores 1.00 (picked), 1.00 (best of three) mIoU against SA-1B's own masks: 12 annotations on 3"
    )
    assert message in caplog.text and "WARNING" not in caplog.text


def test_another_of_the_three_masks_is_found_by_the_best_and_not_by_the_pick(tmp_path):
    metrics = judged(job(tmp_path, None, lambda data: teacher_masks(data, "worst")))
    assert metrics["best"] == pytest.approx(1, abs=1e-3)
    assert metrics["picked"] < 0.9


def test_random_masks_score_low_and_the_likely_causes_are_named(tmp_path, caplog):
    metrics = judged(job(tmp_path, None, noise_masks))
    assert metrics["picked"] <= metrics["best"] < 0.2
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "below 0.3" in warning and "teacher.weights" in warning and "images.root" in warning


def test_a_protocol_s_caps_hold(tmp_path):
    recipe = job(tmp_path)
    metrics = judged(recipe, Sa1b(images=2, annotations=3))
    assert (metrics["annotations"], metrics["images"]) == (6, 2)
    with pytest.raises(UserError, match="annotations=0"):
        Sa1b(annotations=0)


WHOLE = json.dumps(to_rle(np.ones(SIZES[0], bool))).encode()  # of the image sa_9
DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"{", "Expecting property name"),
        (b"\xff\xfe\x00", "decode"),
        (DEEP, "recursion"),
        (b'{"annotations": {"a": 1}}', "dict, expected a list"),
        (b'{"annotations": [7]}', "annotation 0"),
        (b'{"annotations": [{}]}', "has no 'segmentation'"),
        (b'{"annotations": [{"point_coords": [], "segmentation": ' + WHOLE + b"}]}", "annotation 0: list index"),
        (b'{"annotations": [{"point_coords": [[NaN, 1]], "segmentation": ' + WHOLE + b"}]}", r"point \(nan, 1\) lies"),
        (b'{"annotations": [{"point_coords": [[1e9, 1]], "segmentation": ' + WHOLE + b"}]}", "lies outside the image"),
        (
            b'{"annotations": [{"point_coords": [[1' + b"0" * 400 + b', 1]], "segmentation": ' + WHOLE + b"}]}",
            "too large",
        ),
        (b'{"annotations": [{"segmentation": {"size": [48, 72], "counts": [3456]}}]}', "its mask is empty"),
        (
            b'{"annotations": [{"segmentation": {"size": [48, 72], "counts": [3455]}}]}',
            "does not fill the image's 3456",
        ),
        (b'{"annotations": [{"segmentation": [[1, 1, 1e9, 1, 9, 9]]}]}', "point far outside the image"),
        (b'{"annotations": [{"segmentation": "all"}]}', "segmentation is str, expected COCO's RLE or polygons"),
        (b'{"annotations": [{"point_coords": [[1, 1]]}]}', "has no 'segmentation'"),
        (b'{"annotations": [{"point_coords": [[1, 1]], "segmentation": [[1, 2, 3]]}]}', "annotation 0"),
        (described(jpeg(0, (9, 9)), [annotation(np.ones((9, 9), bool), [1, 1])]), r"size \[9, 9\] on an image of"),
    ],
)
def test_malformed_annotations_are_counted_named_and_skipped(tmp_path, caplog, text, says):
    metrics = judged(job(tmp_path, {"sa_9": text}))
    assert (metrics["images"], metrics["annotations"], metrics["skipped"]) == (2, 8, 1)
    assert metrics["picked"] == pytest.approx(1, abs=1e-3)
    (warning,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert warning.getMessage().count("'sa_9'") == 1 and "\n" not in warning.getMessage()
    assert re.search(says, warning.getMessage()), warning.getMessage()


def listed(rle: dict) -> dict:
    """Return COCO's RLE with its counts as a list, from the mask that pycocotools reads."""
    flat = coco.decode({**rle, "counts": rle["counts"].encode()}).T.reshape(-1)
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends, flat.size]).tolist()
    return {"size": rle["size"], "counts": [0, *runs] if flat[0] else runs}


def test_listed_counts_score_as_the_same_masks_compressed(tmp_path):
    def with_lists(data: bytes) -> bytes:
        text = json.loads(teacher_masks(data))
        for annotation in text["annotations"]:
            annotation["segmentation"] = listed(annotation["segmentation"])
        return json.dumps(text).encode()

    metrics = judged(job(tmp_path, None, with_lists))
    assert (metrics["annotations"], metrics["images"], metrics["skipped"]) == (12, 3, 0)
    assert metrics["picked"] == pytest.approx(1, abs=1e-3)


def test_an_annotation_without_a_point_is_prompted_at_its_mask_s_innermost_pixel(tmp_path):
    """A mask's innermost pixel as an explicit point has the same score; another point has another."""

    def squares(points: bool, shift: int = 0):
        def make(data: bytes) -> bytes:
            width, height = PIL.Image.open(io.BytesIO(data)).size
            mask = np.zeros((height, width), bool)
            mask[10:31, 6:27] = True  # 21 x 21, whose centre is (16, 20)
            with_rle = annotation(mask, [16 + shift, 20 + shift])
            polygon = {**with_rle, "segmentation": [[6, 10, 27, 10, 27, 31, 6, 31]]}
            both = [with_rle, polygon]
            if not points:
                for entry in both:
                    del entry["point_coords"]
            return described(data, both)

        return make

    scores = []
    for name, make in (("none", squares(False)), ("centre", squares(True)), ("off", squares(True, 12))):
        (tmp_path / name).mkdir()
        scores.append(judged(job(tmp_path / name, None, make)))
    assert scores[0] == scores[1] and scores[0]["annotations"] == 6 and scores[0]["skipped"] == 0
    assert scores[0]["best"] != scores[2]["best"]


def test_unreadable_annotations_are_reported_and_give_no_score(tmp_path, caplog):
    metrics = judged(job(tmp_path, {f"sa_{i}": b"{" for i in (9, 10, 11)}))
    assert metrics == {"annotations": 0, "images": 0, "skipped": 3}
    assert "none could be read, so the teacher is not scored" in caplog.text


@pytest.mark.parametrize("text", [b'{"caption": "a cat", "url": "https://example.com"}', None])
def test_images_without_sa1b_s_json_are_not_judged(tmp_path, text):
    recipe = job(tmp_path, {f"sa_{i}": text for i in range(1, 12)})
    cache.run(recipe)
    assert judge_teacher(recipe) == []


def test_only_the_source_of_a_mix_that_has_masks_is_judged(tmp_path):
    job(tmp_path)
    sa1b = f"{{name: tar, root: {tmp_path}, train: sa_000020.tar, validation: sa_000021.tar}}"
    photos = "{name: photos, train: 4, validation: 4, size: 64}"
    recipe = tiny.load(
        tmp_path, "images.name=mix", "teacher.exact=true", f"images.sources={{photos: {photos}, sa1b: {sa1b}}}"
    )
    assert judged(recipe)["images"] == 3


def test_run_judges_between_the_cache_and_the_training(tmp_path, caplog):
    with caplog.at_level("INFO"):
        pipeline.run(job(tmp_path, None, teacher_masks, "train.steps=1", "train.batch_size=4", "protocols=[]"))
    places = [caplog.text.index(words) for words in ("images cached", "SA-1B's own masks", "tiny:Student")]
    assert places == sorted(places)


def test_the_check_reads_one_image_of_each_source(tmp_path, monkeypatch):
    recipe = job(tmp_path)
    cache.run(recipe)
    from fmdistill.cache.dataset import CachedImages

    data = CachedImages(cache.open_cache(recipe), "validation")
    calls, real = [], CachedImages.encoded
    monkeypatch.setattr(CachedImages, "encoded", lambda self, s, i: (calls.append((s, i)), real(self, s, i))[1])
    assert annotated_shards(data) == [0] and calls == [(0, 0)]
