"""Toy runs to serve: of the toy SAM, and of an open_clip folder; their students are untrained."""

from pathlib import Path

import clip_run
import tiny
import torch
from nondegenerate import randomize
from starlette.testclient import TestClient

from fmdistill import cache
from fmdistill.serve import app, subjects

LOCAL = "http://127.0.0.1:8000"


def sam_runs(folder: Path, *names: str) -> list[str]:
    """Write runs of the toy SAM, the first of which was trained with SRW; return their folders."""
    folders = []
    for seed, name in enumerate(names):
        weighting = "srw" if seed == 0 else "uniform"
        settings = tiny.load(folder, f"out={folder}/{name}", f"objective.embedding.weighting.name={weighting}")
        cache.run(settings)
        folders.append(str(clip_run.finish(settings, randomize(tiny.Student(), seed))))
    return folders


def clip_folder(folder: Path, *overrides: str) -> str:
    """Write a run of a toy CLIP with two validation images a class; return its folder."""
    clip_run.write_teacher(folder / "teacher")
    clip_run.write_classes(folder / "train", 1)
    clip_run.write_classes(folder / "val", 2, seed=7)
    settings = clip_run.load(folder, *overrides)
    cache.run(settings)
    return str(clip_run.finish(settings, randomize(clip_run.Student(), 1)))


def client(folders: list[str], host: str = "127.0.0.1", base_url: str = LOCAL) -> TestClient:
    """Return a client of the application that serves the runs."""
    opened = subjects.open_runs(folders, device="cpu", trust=True)
    return TestClient(app.build(opened, host), base_url=base_url, raise_server_exceptions=False)


def answer(response: object, status: int = 200) -> dict:
    """Return a response's JSON, which must have this status."""
    assert response.status_code == status, response.text  # type: ignore[attr-defined]
    return response.json()  # type: ignore[attr-defined]


def mask(entry: dict, size: list[int]) -> torch.Tensor:
    """Return the mask bool (H, W) that a browser reads from the lengths of its runs."""
    values = torch.arange(len(entry["runs"])) % 2 == 1
    return values.repeat_interleave(torch.tensor(entry["runs"])).view(*size)
