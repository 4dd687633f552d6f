"""The folder that `fmdistill export RUN web` writes; tests/test_export_web_page.py opens it in a browser."""

import json
import re
from types import SimpleNamespace

import clip_run
import numpy as np
import PIL.Image
import pytest
import tiny
from nondegenerate import randomize

from fmdistill import cache, export
from fmdistill.export import web
from fmdistill.predict import artefact
from fmdistill.registry import UserError


def package(folder):
    """Write files with the names of onnxruntime-web's; return the package's folder."""
    (folder / "dist").mkdir(parents=True)
    for name in (*web.RUNTIME_FILES, "ort.webgl.mjs"):
        (folder / "dist" / name).write_text(name)
    return folder


def test_a_run_becomes_a_folder_of_static_files(tmp_path):
    pytest.importorskip("onnxruntime")
    settings = tiny.load(tmp_path)
    cache.run(settings)
    run = clip_run.finish(settings, randomize(tiny.Student(), 1))
    mine = tmp_path / "mine"
    mine.mkdir()
    PIL.Image.new("RGB", (30, 20), "red").save(mine / "red.png")
    chosen = {"runtime": str(package(tmp_path / "npm")), "samples": str(mine)}
    out = export.run(run, "web", tmp_path / "page", trust=True, settings=chosen)
    described = artefact.read(out)
    page = described.model["page"]
    assert page["runtime"] == "ort/" and page["samples"] == ["samples/red.png"]
    assert sorted(path.name for path in (out / "ort").iterdir()) == sorted(web.RUNTIME_FILES)
    assert page["bytes"] == {name: (out / name).stat().st_size for name in ("encoder.onnx", "decoder.onnx")}
    assert described.check["miou"] > 0.99 and described.format == "web"
    for name in re.findall(r'(?:src|href)="([\w.]+)"', (out / "index.html").read_text()):
        assert name in described.files


def test_without_a_copy_browsers_load_the_tested_version_from_the_cdn(tmp_path):
    for name in ("encoder.onnx", "decoder.onnx"):
        (tmp_path / name).write_bytes(b"12345")
    page = web.write_page(tmp_path, [], ["coffee"])
    assert page["runtime"] == f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{web.RUNTIME_VERSION}/dist/"
    assert not (tmp_path / "ort").exists()
    assert np.asarray(PIL.Image.open(tmp_path / "samples/coffee.jpg")).shape == (400, 600, 3)
    assert json.dumps(page)


def test_wrong_input_is_refused_in_one_line(tmp_path):
    clip = SimpleNamespace(family="clip", recipe=SimpleNamespace(out="runs/clip"))
    with pytest.raises(UserError, match="export web: runs/clip was distilled from the family 'clip'"):
        web.run(clip, tmp_path / "page")
    root = package(tmp_path / "npm")
    (root / "dist" / "ort-wasm-simd-threaded.wasm").unlink()
    with pytest.raises(
        UserError, match=r"runtime=.*npm: has no ort-wasm-simd-threaded.wasm; `npm pack onnxruntime-web"
    ):
        web._runtime_files(str(root))
    with pytest.raises(UserError, match="samples=.*empty: no folder with pictures"):
        web._samples(str(tmp_path / "empty"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "notes.png").write_text("notes")
    with pytest.raises(UserError, match="notes.png cannot be decoded"):
        web._samples(str(tmp_path / "bad"))
    assert not (tmp_path / "page").exists()
