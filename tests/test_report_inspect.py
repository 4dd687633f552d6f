"""`inspect` reports what a shard holds, and damage is a one-line error."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest
import tiny
import torch

from fmdistill import cache, recipe
from fmdistill.cache import sidecar as sidecars
from fmdistill.cli import main
from fmdistill.registry import UserError
from fmdistill.report import inspect


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the readers of a toy cache's training and validation shards; photographs are padded."""
    folder = tmp_path_factory.mktemp("inspect")
    settings = tiny.load(folder)
    cache.run(settings)
    return cache.open_cache(settings).shards


@pytest.fixture
def shard(made, tmp_path):
    """Return a copy of a validation shard, exact, in a cache of its own."""
    source = made["validation"][0].path
    for path in (source, source.with_suffix(".json"), source.with_name("manifest.json")):
        shutil.copy(path, tmp_path)
    return tmp_path / source.name


def weights(vectors_ND: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return SRW's weights by its equations, over all pairs."""
    unit = vectors_ND.double() / vectors_ND.double().norm(dim=1, keepdim=True)
    return torch.softmax(-(unit @ unit.T).mean(1) / temperature, 0) * len(unit)


def quantiles(weight_N: torch.Tensor) -> str:
    low, fifth, middle, high, top = np.quantile(weight_N.numpy(), [0, 0.05, 0.5, 0.95, 1])
    return f"least {low:.3f}, 5 % {fifth:.3f}, median {middle:.3f}, 95 % {high:.3f}, largest {top:.3f}"


def field(lines: list[str], start: str) -> str:
    (line,) = [line for line in lines if line.startswith(start)]
    return line.removeprefix(start).strip()


@pytest.mark.parametrize("suffix", [".tar", ".json", ""])
def test_a_shard_is_described_and_drawn(made, shard, suffix, tmp_path):
    reader, out = made["validation"][0], tmp_path / "map.png"
    key = reader.keys[2]
    lines = list(inspect.run(str(shard.with_suffix(suffix)), [f"out={out}", f"key={key}", "temperature=0.1"]))
    assert lines[0].startswith(f"{shard.stem}: 8 images of tiny, validation, 0 failed")
    assert field(lines, "keys") == ", ".join([*reader.keys[:3], "...", *reader.keys[-3:]])
    assert "agree" in field(lines, "tar and sidecar") and "32x4x4" in field(lines, "embedding ")
    start = 16 * np.arange(4)
    valid = [np.logical_and.outer(start < h, start < w) for h, w in (s["resized"] for s in reader.samples)]
    maps = [reader.read(i)["embedding"] for i in range(8)]
    inside = np.concatenate([m[:, v].reshape(-1) for m, v in zip(maps, valid, strict=True)])
    expected = (
        f"{inside.size // 32} tokens, mean {inside.mean(dtype=float):.4g}, deviation {inside.std(dtype=float):.4g}"
    )
    assert field(lines, "  valid") == f"{expected}, largest {np.abs(inside).max():.4g}"
    vectors_ND = torch.from_numpy(maps[2][:, valid[2]]).T
    assert quantiles(weights(vectors_ND, 0.1)) in field(lines, f"weights of {key}")
    picture = PIL.Image.open(out)
    assert picture.format == "PNG" and len(set(picture.convert("RGB").getdata())) > 16


def test_vectors_are_weighed_within_their_shard(tmp_path):
    small = ["images.train=12", "images.validation=4", f"cache.root={tmp_path}/cache", "teacher.weights=none"]
    settings = recipe.load("recipes/demo/clip_mse.yaml", small)
    cache.run(settings)
    (reader,) = cache.open_cache(settings).shards["train"]
    lines = list(inspect.run(str(reader.path), ["temperature=0.2"]))
    expected = weights(torch.from_numpy(np.stack([reader.read(i)["embedding"] for i in range(12)])), 0.2)
    assert quantiles(expected) in field(lines, "weights  ")
    first = reader.keys[int(expected.argmax())]
    assert field(lines, "  largest").startswith(f"{first} {float(expected.max()):.3f}")
    assert not list(tmp_path.rglob("*.png"))


def rewritten(fields):
    return sidecars.write({name: value for name, value in fields.items() if name != "checksum"})


def planted(shard, how):
    sidecar, json_path = shard.with_suffix(".json").read_text(), shard.with_suffix(".json")
    fields = json.loads(sidecar)
    data = bytearray(shard.read_bytes())
    if how == "flipped":
        data[fields["samples"][3]["outputs"]["embedding"]["offset"] + 200] ^= 1
        shard.write_bytes(data)
        return f"the embedding of '{fields['samples'][3]['key']}' is damaged"
    if how == "flipped header":
        data[0] ^= 1
        shard.write_bytes(data)
        return "bytes outside its members are damaged"
    if how == "short":
        shard.write_bytes(data[:-512])
        return "in its sidecar"
    if how == "no tar":
        shard.unlink()
        return "missing, although its sidecar exists"
    if how == "no sidecar":
        json_path.unlink()
        return "the shard is not finished"
    if how == "half a sidecar":
        json_path.write_text(sidecar[: len(sidecar) // 2])
        return "not a sidecar"
    if how == "another's":
        fields["identity"] = "0" * 16
    elif how == "no resized":
        del fields["samples"][0]["resized"]
    elif how == "an unknown codec":
        fields["codecs"]["embedding"] = "float7"
    elif how == "samples of texts":
        fields["samples"] = ["a", "b"]
    elif how == "statistics":
        fields["statistics"]["embedding"] = [1]
    json_path.write_text(rewritten(fields))
    return "another cache" if how == "another's" else "not a sidecar"


@pytest.mark.parametrize(
    "how",
    "flipped, flipped header, short, no tar, no sidecar, half a sidecar, another's, no resized, an unknown codec, "
    "samples of texts, statistics".split(", "),
)
def test_damage_is_a_one_line_error(shard, how, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FMDISTILL_TRACEBACK", raising=False)
    message = planted(shard, how)
    assert main(["inspect", str(shard)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1] and lines[-1].startswith("fmdistill: error: ") and "Traceback" not in "".join(lines)


def test_failures_are_reported_and_unreadable_statistics_named(shard, tmp_path):
    sidecar = shard.with_suffix(".json")
    fields = json.loads(sidecar.read_text())
    fields["failed"] = [{"key": f"bad{i}", "index": 9 + i, "problem": "cannot be decoded: x"} for i in range(5)]
    fields["statistics"]["embedding"]["valid"]["sum"] = None
    sidecar.write_text(rewritten(fields))
    lines = list(inspect.run(str(shard), [f"out={tmp_path}/a.png"]))
    assert [line for line in lines if line.startswith("failed")][-1].endswith("and 2 more")
    assert "bad0: cannot be decoded: x" in "\n".join(lines) and "cannot be read" in field(lines, "  valid")


def test_wrong_settings_are_named_in_the_error(shard, tmp_path):
    (tmp_path / "head.json").write_text("{}")
    first = json.loads(shard.with_suffix(".json").read_text())["samples"][0]["key"]
    for path, overrides, message in (
        (shard, ["key=nobody"], f"^key=nobody: none of the 8 images in .*tar. The first is '{first}'$"),
        (shard, [f"key={first}x"], f"^key={first}x: none of .*tar. Did you mean '{first}'\\?$"),
        (shard, ["output=logits"], "^output=logits: this cache has none"),
        (shard, ["temperature=0"], "^temperature=0: expected a number above 0"),
        (shard, ["temprature=1"], "Did you mean 'temperature'"),
        (tmp_path / "nothing", [], "no such shard"),
        (tmp_path / "head.json", [], "belongs to the whole cache"),
    ):
        with pytest.raises(UserError, match=message):
            list(inspect.run(str(path), overrides))
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(UserError, match="damaged, its"):
        list(inspect.run(str(shard), []))
