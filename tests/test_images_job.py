"""Tests of caching and distilling oddly named files in folders and tars: no embedding is swapped."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tiny
import torch

from fmdistill import cache, distill
from fmdistill.cache.dataset import CachedImages
from fmdistill.distill.data import every
from fmdistill.distill.loader import batches
from fmdistill.distill.student import load_student
from fmdistill.images import build
from fmdistill.recipe import Recipe

# As key: names that a split at the first dot, a change of case, unquoting or Unicode normalisation would merge.
ODD = [
    "a.v1.jpg",
    "a.v2.jpg",
    "a.jpg",
    "A.JPG",
    "a.jpeg",
    "deep/er/a.jpg",
    "deep.er/a.jpg",
    "deep%2Fer/a.jpg",
    "with space/b c .png",
    "with space/b%20c .png",
    "caf\u00e9.jpg",
    "cafe\u0301.jpg",
    "\u732b/\U0001f408 \u00fc.webp",
    "percent%.bmp",
    "plus+and&=?#'\"[1].png",
    "-dash.tiff",
    "n" * 60 + "/" + "m" * 150 + ".Jpg",
    os.fsdecode(b"latin\xe9.jpg"),
]
BROKEN = "deep/broken .v1.JPG"
KINDS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "tiff": "TIFF"}
FEW = ("train.steps=3", "train.batch_size=4", "train.validate_every=3", "train.checkpoint_every=3")


def picture(number: int, name: str) -> bytes:
    """Return a distinct image that is not square, in the format of its suffix."""
    rng = np.random.default_rng(number)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((50 + 3 * (number % 5), 80 - 4 * (number % 7))).save(buffer, KINDS[name.rpartition(".")[2].lower()])
    return buffer.getvalue()


def folder_of(root: Path) -> tuple[Recipe, dict[str, bytes]]:
    """Return a recipe on nested files, one of them broken, and each key's expected bytes."""
    stored = {}
    for number, key in enumerate([*ODD, *(f"plain/{i}.jpg" for i in range(12)), BROKEN]):
        stored[key] = picture(number, key)
        path = root / "images" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stored[key][:300] if key == BROKEN else stored[key])
    del stored[BROKEN]
    settings = (f"images.root={root / 'images'}", "images.validation=0.3", "images.shard_size=6")
    return tiny.load(root, "images.name=folder", *settings, *FEW, "cache.max_failed=0.1"), stored


def tars_of(root: Path) -> tuple[Recipe, dict[str, bytes]]:
    """Return a recipe on three tars, the first like SA-1B's, and each key's expected bytes."""
    sa1b = [f"./sa_{number}.jpg" for number in (223750, 223751, 9, 10, 100)]
    same = ("a.v2.jpg", "a.jpeg", "a.jpg")  # a key ends at the first dot, and a tar has one image a key
    odd = [name for name in ODD if name not in same]
    stored, broken = {}, "held out/broken"
    for number, (tar, names) in enumerate({"sa_000020": sa1b, "odd": odd, "held.out-1": [f"{broken}.v1.jpg"]}.items()):
        columns = []
        with tarfile.open(root / f"{tar}.tar", "w", format=tarfile.PAX_FORMAT) as file:
            plain = [f"held out/{i}.v1.jpg" for i in range(5)] if tar == "held.out-1" else []
            for place, name in enumerate([*names, *plain]):
                folder, slash, base = name.removeprefix("./").rpartition("/")
                key = folder + slash + base.partition(".")[0]
                data = picture(100 * number + place, name)
                if key == broken:
                    data = data[:300]
                else:
                    stored[key] = data
                columns.append((f"{name.rpartition('.')[0]}.json", b'{"caption": "none"}'))
                add(file, name, data)
            for name, data in columns:  # in SA-1B, a JSON is not next to its image
                add(file, name, data)
    tars = ("images.train=[sa_000020.tar, odd.tar]", "images.validation=held.*.tar", f"images.root={root}")
    return tiny.load(root, "images.name=tar", *tars, *FEW, "cache.max_failed=0.1"), stored


def add(file: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    file.addfile(info, io.BytesIO(data))


@pytest.fixture(params=[folder_of, tars_of])
def job(request, tmp_path) -> tuple[Recipe, dict[str, bytes]]:
    return request.param(tmp_path)


def embedded(data: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an image's prepared pixels and teacher embedding, computed without source and cache."""
    teacher = tiny.teacher()
    with PIL.Image.open(io.BytesIO(data)) as image:
        pixels, size = teacher.preprocess.prepare(image.convert("RGB"))
    return pixels, teacher(pixels[None], torch.tensor([size]))["embedding"][0]


def test_every_key_has_its_own_image_and_its_own_embedding(job, caplog):
    recipe, stored = job
    cache.run(recipe)
    opened = cache.open_cache(recipe)
    expected = {key: embedded(data) for key, data in stored.items()}
    everything = torch.stack([embedding for _, embedding in expected.values()]).flatten(1)
    nearest = torch.cdist(everything, everything, p=float("inf")).fill_diagonal_(torch.inf).min()
    seen = []
    for split, step in (("train", 2.0**-11), ("validation", 0.0)):
        data = CachedImages(opened, split)
        for batch in batches(data, every(data, 4), workers=0):
            outputs = data.decode(batch)["outputs"]["sam.embedding"]
            for key, pixels, embedding in zip(batch["keys"], batch["pixels"], outputs, strict=True):
                seen.append(key)
                expected_pixels, expected_embedding = expected[key]
                allowed = float(expected_embedding.abs().max()) * (step + 1e-5)
                assert allowed < nearest / 4, "the images are too much alike for a swap to show"
                assert torch.equal(pixels, expected_pixels), key
                assert float((embedding - expected_embedding).abs().max()) <= allowed, key
    assert sorted(seen) == sorted(stored)
    (failed,) = [
        failure for path in sorted(opened.root.glob("*-*.json")) for failure in json.loads(path.read_text())["failed"]
    ]
    assert "broken" in failed["key"] and "cannot be decoded" in failed["problem"]
    assert f"'{failed['key']}' skipped" in caplog.text


def test_distillation_runs_on_them_and_survives_a_second_cache_run(job):
    recipe, stored = job
    cache.run(recipe)
    before = {path.name: path.read_bytes() for path in Path(recipe.cache.root).iterdir()}
    cache.run(recipe)
    assert {path.name: path.read_bytes() for path in Path(recipe.cache.root).iterdir()} == before
    cache.verify(recipe, samples=len(stored))
    run = distill.run(recipe)
    assert (run / "metrics.jsonl").read_text().count('"learning_rate"') == 3
    assert not load_student(run, trust=True).training


def test_a_source_lists_the_keys_that_it_reads_and_fetches(job):
    recipe, stored = job
    images = build(recipe.images)
    for shard in images.shards():
        read = list(images.read(shard))
        assert images.source.keys(shard.name) == [image.key for image in read]
        for image in read:
            assert images.source.fetch(shard.name, image.key) == image
            assert image.data == stored.get(image.key, image.data[:300])  # 300 bytes are left of the broken one


def test_two_caches_of_a_folder_with_a_broken_image_are_equal_byte_for_byte(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(8):
        (tmp_path / f"images/{number}.jpg").write_bytes(picture(number, "a.jpg"))
    (tmp_path / "images/no.jpg").write_bytes(b"no image")  # PIL's message names an object by its address
    caches = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        own = (f"images.root={tmp_path / 'images'}", "images.validation=0.3", "cache.max_failed=0.2")
        cache.run(tiny.load(tmp_path / name, "images.name=folder", *own))
        caches.append(
            {p.name: p.read_bytes() for p in (tmp_path / name / "cache").iterdir() if p.name != "recipe.yaml"}
        )
    assert caches[0] == caches[1]
    failed = [f for name, data in caches[0].items() if ".json" in name for f in json.loads(data).get("failed", [])]
    assert [failure["key"] for failure in failed] == ["no.jpg"] and "0x" not in failed[0]["problem"]
