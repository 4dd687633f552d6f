import dataclasses
import hashlib
import io
import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from fmdistill.mini import drawing
from fmdistill.mini.photos import PHOTOGRAPHS
from fmdistill.mini.scenes import Scenes, decode_labels, draw, visible_areas
from fmdistill.registry import UserError

SMALL = Scenes(train=10, validation=5, size=64, shard_size=4)


def digest(scenes):
    drawn = [draw(scenes, split, index) for split in ("train", "validation") for index in range(6)]
    return hashlib.sha256(b"".join(s.pixels.tobytes() + s.labels.tobytes() for s in drawn)).hexdigest()


def test_scenes_are_the_same_in_another_process_whatever_its_threads():
    code = "from tests.test_mini_scenes import SMALL, digest; print(digest(SMALL))"
    for threads in ("1", "2"):
        env = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "PYTHONHASHSEED": threads, "PATH": ""}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        assert done.stdout.split()[-1] == digest(SMALL)


def test_seed_split_and_index_each_change_the_scene():
    scenes = [
        draw(SMALL, "train", 0),
        draw(SMALL, "validation", 0),
        draw(SMALL, "train", 4),
        draw(dataclasses.replace(SMALL, seed=1), "train", 0),
    ]
    assert len({scene.pixels.tobytes() for scene in scenes}) == 4


def test_half_of_the_scenes_are_not_square_and_labels_fit_the_pixels():
    shapes = []
    for index in range(16):
        pixels, labels = draw(SMALL, "train", index)
        assert pixels.dtype == np.uint8 and labels.dtype == np.int16
        assert pixels.shape == (*labels.shape, 3)
        shapes.append(labels.shape)
    assert [shapes.count(shape) for shape in ((64, 64), (43, 64), (64, 43))] == [8, 4, 4]


def test_labels_count_from_one_and_keep_no_object_below_the_least_area():
    scenes = dataclasses.replace(SMALL, min_visible=20)
    for index in range(20):
        areas = visible_areas(draw(scenes, "train", index).labels)
        assert (areas * draw(scenes, "train", index).labels.size >= 20 - 1e-6).all()
        assert len(areas) <= scenes.objects[1]


def test_labels_lie_where_the_pixels_change():
    plain = Scenes(size=128, textured=0, photo_background=0, low_contrast=0, noise=0, blur=0, illumination=0)
    for index in range(8):
        pixels, labels = draw(plain, "train", index)
        step = np.abs(np.diff(pixels.astype(int), axis=1)).sum(axis=2)
        # an edge is blended over its pixel, so the step is looked for beside it too
        near = np.max([np.roll(step, shift, axis=1) for shift in (-1, 0, 1)], axis=0)[:, 2:-2]
        edge = (np.diff(labels, axis=1) != 0)[:, 2:-2]
        assert np.mean(near[edge] > 12) > 0.9
        assert np.median(step[:, 2:-2][~edge]) <= 6


def test_default_areas_have_a_long_tail_and_objects_hide_one_another():
    scenes = Scenes()
    areas = np.concatenate([visible_areas(draw(scenes, "train", i).labels) for i in range(60)])
    assert 0.35 < np.mean(areas < 0.01) < 0.6
    assert np.mean(areas > 0.05) > 0.1
    assert areas.min() * 256 * 171 >= scenes.min_visible

    def overlap(occlusion):
        crowded = Scenes(size=64, occlusion=occlusion, area=(0.02, 0.05), objects=(8, 8))
        return np.mean([(draw(crowded, "train", i).labels > 0).mean() for i in range(0, 80, 2)])

    assert overlap(1.0) < 0.9 * overlap(0.0)


def test_low_contrast_objects_are_closer_to_what_lies_beneath():
    rng = np.random.default_rng(0)
    for low, high in ((12, 28), (50, 255)):
        for _ in range(200):
            beneath = rng.uniform(0, 255, 3)
            distance = np.linalg.norm(drawing.colour(rng, beneath, (low, high)) - beneath)
            assert low * 0.5 <= distance <= high + 1e-3


@pytest.mark.parametrize("shape", list(drawing.SHAPES))
def test_every_outline_encloses_the_area_that_was_asked(shape, monkeypatch):
    monkeypatch.setattr(drawing, "SHAPES", {shape: drawing.SHAPES[shape]})
    monkeypatch.setattr(drawing, "SHARES", (1.0,))
    rng = np.random.default_rng(1)
    for _ in range(5):
        curves = [curve + 200 for curve in drawing.outline(rng, 3000.0)]
        drawn = drawing.rasterize(curves, (400, 400))
        assert drawn is not None
        assert (drawn[1] >= 128).sum() == pytest.approx(3000, rel=0.06)


def test_an_outline_outside_the_frame_is_nothing():
    square = np.array([[0, 0], [4, 0], [4, 4], [0, 4]]) - 10.0
    assert drawing.rasterize([square], (32, 32)) is None


def test_validation_photographs_are_never_touched(monkeypatch):
    used = set()
    real = drawing.photograph
    monkeypatch.setattr(drawing, "photograph", lambda name: used.add(name) or real(name))
    drawing._image.cache_clear()
    for index in range(60):
        draw(SMALL, "train", index)
        draw(SMALL, "validation", index)
    assert used == set(PHOTOGRAPHS["train"])
    assert not used & set(PHOTOGRAPHS["validation"])


def test_fetch_equals_read_and_carries_the_labels():
    assert SMALL.shards() == {
        "train": ["train-000", "train-001", "train-002"],
        "validation": ["validation-000", "validation-001"],
    }
    for split, names in SMALL.shards().items():
        index = 0
        for name in names:
            read = list(SMALL.read(name))
            assert len(read) == SMALL.count(name)
            assert [SMALL.fetch(name, e.key) for e in read] == read
            for encoded in read:
                scene = draw(SMALL, split, index)
                assert np.array_equal(np.array(PIL.Image.open(io.BytesIO(encoded.data))), scene.pixels)
                assert np.array_equal(decode_labels(encoded.extra["labels.png"]), scene.labels)
                index += 1
    with pytest.raises(KeyError):
        SMALL.fetch("train-000", "scene-train-000009")


def test_identity_is_json_and_holds_every_setting():
    identity = SMALL.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert set(identity) == {"name"} | {f.name for f in dataclasses.fields(Scenes)}


@pytest.mark.parametrize("setting", [{"objects": (5, 3)}, {"area": (0.0, 0.1)}, {"occlusion": 1.5}, {"noise": -1.0}])
def test_wrong_settings_are_errors(setting):
    with pytest.raises(UserError, match=f"images.{next(iter(setting))}="):
        Scenes(**setting)
