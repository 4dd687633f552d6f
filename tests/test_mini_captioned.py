import dataclasses
import hashlib
import io
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import PIL.Image
import pytest

from fmdistill.mini import drawing, figures
from fmdistill.mini.captioned import Captioned, class_names, combinations, unseen, words
from fmdistill.mini.photos import PHOTOGRAPHS
from fmdistill.registry import UserError

SMALL = Captioned(train=10, validation=5, shard_size=4)


def pixels(encoded):
    return np.array(PIL.Image.open(io.BytesIO(encoded.data)))


def every(source, split):
    return [encoded for shard in source.shards()[split] for encoded in source.read(shard)]


def digest(source):
    held = [(e.key, e.data, e.label, e.extra["txt"]) for split in ("train", "validation") for e in every(source, split)]
    return hashlib.sha256(repr(held).encode()).hexdigest()


def test_images_and_captions_are_the_same_in_another_process():
    code = "from tests.test_mini_captioned import SMALL, digest; print(digest(SMALL))"
    env = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "3", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split()[-1] == digest(SMALL)


def test_an_image_depends_on_nothing_but_settings_split_and_index():
    larger = dataclasses.replace(SMALL, train=12, shard_size=7)
    assert [e.data for e in every(larger, "train")][:10] == [e.data for e in every(SMALL, "train")]
    first = [every(source, "train")[0].data for source in (SMALL, dataclasses.replace(SMALL, seed=1))]
    assert len({*first, every(SMALL, "validation")[0].data}) == 3


def test_fetch_equals_read():
    for names in SMALL.shards().values():
        for name in names:
            read = list(SMALL.read(name))
            assert [e.key for e in read] == SMALL.keys(name) and len(read) == SMALL.count(name)
            assert [SMALL.fetch(name, e.key) for e in read] == read
    for key in ("captioned-train-000009", "captioned-validation-000001", "captioned-train-1", "photo"):
        with pytest.raises(KeyError):
            SMALL.fetch("train-000", key)


def test_the_caption_and_the_label_name_what_the_picture_shows():
    source = Captioned(train=300, validation=300)
    for split in ("train", "validation"):
        for index, encoded in enumerate(every(source, split)):
            shown, text = source.attributes(split, index), encoded.extra["txt"].decode()
            assert class_names()[encoded.label] == shown.name
            said = set(text.replace(",", "").split())
            assert {shown.shape, shown.colour, shown.texture} <= said
            others = {*figures.SHAPES, *figures.COLOURS, *figures.TEXTURES, *figures.SIZES, "left", "right", "top"}
            assert not said & (others - set(" ".join(shown).split()))
            assert said <= set(words())


def test_more_than_two_hundred_classes_of_which_a_fifth_is_never_trained_on():
    assert len(set(class_names())) == len(combinations()) == 256
    assert len(unseen()) == 51
    assert ("circle", "red", "plain") not in unseen() and ("circle", "red", "checkered") not in unseen()
    assert len({(shape, colour) for shape, colour, _ in unseen()}) == 51
    for place, values in enumerate((figures.SHAPES, figures.COLOURS, figures.TEXTURES)):
        counts = Counter(combination[place] for combination in unseen())
        assert set(counts) == set(values) and max(counts.values()) - min(counts.values()) <= 1
    source = Captioned(train=4000)
    shown = [source.attributes("train", index) for index in range(source.train)]
    assert not {(a.shape, a.colour, a.texture) for a in shown} & unseen()


def test_training_has_a_long_tail_and_none_at_exponent_zero():
    for zipf, rarest in ((1.0, 1 / 8), (0.0, 1.0)):
        source = Captioned(zipf=zipf)
        shown = [source.attributes("train", index) for index in range(4000)]
        for field, values in (("shape", figures.SHAPES), ("colour", figures.COLOURS)):
            counts = Counter(getattr(a, field) for a in shown)
            share = counts[list(values)[-1]] / counts[list(values)[0]]
            assert 0.7 * rarest < share < 1.4 * rarest, (zipf, field, counts)


@pytest.mark.parametrize("part, number", [("seen", 205), ("unseen", 51), ("all", 256)])
def test_validation_is_uniform_over_the_asked_combinations(part, number):
    source = Captioned(validation=2 * number, validation_combinations=part)
    shown = [source.attributes("validation", index) for index in range(source.validation)]
    counts = Counter((a.shape, a.colour, a.texture) for a in shown)
    assert len(counts) == number and set(counts.values()) == {2}
    assert part == "all" or all((combination in unseen()) == (part == "unseen") for combination in counts)
    assert len({a.shape for a in shown[:16]}) > 3, "a short split is as mixed as the whole"


def test_the_colour_of_a_figure_is_the_one_that_is_named():
    source = Captioned(photo_background=0.0, noise=0.0)
    reference = np.array(list(figures.COLOURS.values()), float)
    right = []
    for index in range(200):
        rng = np.random.default_rng(index)
        colour = list(figures.COLOURS)[index % 8]
        shown = figures.Attributes("circle", colour, "plain", "large", "in the middle")
        centre = figures.draw(rng, shown, 64, source.photo_background, source.noise)[28:36, 28:36].mean((0, 1))
        right.append(list(figures.COLOURS)[np.linalg.norm(reference - centre, axis=1).argmin()] == colour)
    assert np.mean(right) > 0.9


@pytest.mark.parametrize("shape", figures.SHAPES)
def test_every_figure_lies_where_its_place_says(shape):
    def drawn(place, size, colour):
        shown = figures.Attributes(shape, colour, "plain", size, place)
        return figures.draw(np.random.default_rng(1), shown, 64, 0.0, 0.0).astype(float)

    for place, direction in figures.PLACES.items():
        for size in figures.SIZES:
            picture = drawn(place, size, "red")
            inside = (picture[:, :, 0] > 120) & (picture[:, :, 1:].max(axis=2) < 75)
            y, x = np.nonzero(inside)
            assert len(x) > 60, (place, size)
            moved = (np.array([x.mean(), y.mean()]) - 31.5) / 64
            for own, wanted in zip(moved, direction, strict=True):
                assert abs(own) < 0.14 if wanted == 0 else own * wanted > 0.1, (place, size, moved)


def test_shapes_differ_and_patterns_mark_the_surface():
    masks = {}
    for shape in figures.SHAPES:
        drawn = drawing.rasterize([curve * 20 + 32 for curve in figures.curves(shape)], (64, 64))
        assert drawn is not None
        mask = np.zeros((64, 64), bool)
        mask[drawn[0]] = drawn[1] >= 128
        masks[shape] = mask
        assert 0.08 < mask.mean() < 0.35, shape
    for a in masks:
        for b in masks:
            assert a == b or (masks[a] & masks[b]).sum() < 0.9 * (masks[a] | masks[b]).sum(), (a, b)
    marked = {}
    for pattern in figures.TEXTURES:
        painted = figures._paint(np.random.default_rng(0), np.array([200.0, 60, 60]), pattern, (64, 64), 64)
        marked[pattern] = (painted[:, :, 0] < 150).mean()
    assert marked["plain"] == 0 and all(0.2 < share < 0.6 for name, share in marked.items() if name != "plain")


def test_validation_photographs_are_never_touched(monkeypatch):
    used = set()
    real = drawing.photograph
    monkeypatch.setattr(drawing, "photograph", lambda name: used.add(name) or real(name))
    drawing._image.cache_clear()
    source = Captioned(train=60, validation=60, photo_background=1.0)
    every(source, "train"), every(source, "validation")
    assert used == set(PHOTOGRAPHS["train"])


def test_identity_is_json_and_holds_every_setting():
    identity = SMALL.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert set(identity) == {"name"} | {f.name for f in dataclasses.fields(Captioned)}


@pytest.mark.parametrize("setting", [{"photo_background": 1.5}, {"zipf": -1.0}, {"noise": -1.0}, {"size": 4}])
def test_wrong_settings_are_errors(setting):
    with pytest.raises(UserError, match=f"images.{next(iter(setting))}="):
        Captioned(**setting)
