"""The second stage by two processes takes the steps of one; twenty kills leave its weights. torchrun starts this."""

import sys
from pathlib import Path

import kills
import pytest
import test_distill_processes as processes
import test_distill_refine as second_stage
import tiny
import torch
from safetensors.torch import load_file
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom

from fmdistill import cache, distill
from fmdistill.cache.reader import Cache
from fmdistill.distill import refine
from fmdistill.distill.checkpoint import save_state
from fmdistill.distill.student import HEAD, WEIGHTS

STEPS = 3  # parameters without a gradient stop several processes at the second step
STEP = [f"train.steps={STEPS}", f"train.checkpoint_every={STEPS}", f"train.validate_every={STEPS}"]
TERM = "{output: masks, distance: {name: mask}, weighting: {name: hard_mask}}"


class Still(tiny.Student):
    """The toy student in float64 with its BatchNorm frozen, whose statistics would be those of a micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.double()

    def train(self, mode: bool = True):
        super().train(mode)
        self.net[1].eval()
        return self

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {"embedding": (B, 32, 4, 4)}."""
        return super().forward(image.double())


def in_double(set_attribute) -> None:
    """Decode in float64; segment_anything computes positions in float32 whatever the weights are."""
    positions, head, answers = PositionEmbeddingRandom._pe_encoding, Cache.head, refine.Refine._answers
    set_attribute(
        PositionEmbeddingRandom,
        "_pe_encoding",
        lambda self, xy: positions(self, xy.to(self.positional_encoding_gaussian_matrix)),
    )
    set_attribute(Cache, "head", lambda self: head(self).double())
    set_attribute(
        refine.Refine,
        "_answers",
        lambda self, student, teacher, batch: answers(self, student, teacher.double(), batch),
    )


def trained(folder: Path, out: str, head: str, accumulate: int) -> dict[str, torch.Tensor]:
    recipe = second_stage.load(
        folder,
        *STEP,
        "student.name=test_distill_refine_processes:Still",
        f"out={folder}/{out}-{head}",
        f"task.head={head}",
        f"train.accumulate={accumulate}",
        f"objective={{masks: {TERM}}}",
    )
    distill.run(recipe)
    return load_file(f"{recipe.out}/checkpoints/step-{STEPS:08d}/task.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, toy_cache) -> Path:
    """A folder with the toy cache."""
    path = tmp_path_factory.mktemp("refine_processes")
    (path / "cache").symlink_to(toy_cache)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_two_processes_and_accumulation_take_the_steps_of_one(folder, head, monkeypatch):
    in_double(monkeypatch.setattr)
    done = processes.torchrun(folder, head, script=__file__)
    assert done.returncode == 0, done.stderr[-3000:]
    one, accumulated = trained(folder, "one", head, 1), trained(folder, "parts", head, 2)
    two = load_file(folder / f"two-{head}.safetensors")
    assert one.keys() == two.keys() == accumulated.keys()
    assert any(name.startswith("student.prompt_head.") for name in one) is (head == "trained")
    assert all(value.dtype == torch.float64 for value in one.values() if value.is_floating_point())
    for name, value in one.items():
        torch.testing.assert_close(two[name], accumulated[name], rtol=0, atol=1e-10)
        torch.testing.assert_close(accumulated[name], value, rtol=0, atol=1e-10)
    torch.manual_seed(0)  # the recipe's seed
    untrained = Still().net[0].weight.detach()
    assert float((one["student.net.0.weight"] - untrained).abs().max()) > 1e-3  # or equal weights would show nothing
    start = cache.open_cache(second_stage.load(folder)).head().state_dict()
    moved = [
        n for n, v in one.items() if (m := n.removeprefix("student.prompt_head.")) in start and (v != start[m]).any()
    ]
    assert bool(moved) is (head == "trained")


@pytest.mark.slow
def test_twenty_kills_leave_the_same_weights_and_log(folder, tmp_path):
    """With a trained head and a moving average; prompts and corrections are drawn again."""
    (tmp_path / "cache").symlink_to(folder / "cache")
    settings = ["train.steps=200", "train.checkpoint_every=5", "train.validate_every=40", "train.ema=0.9"]
    settings += ["task.head=trained", "task.prompts=1", "train.batch_size=2"]
    whole = distill.run(second_stage.load(tmp_path, f"out={tmp_path}/whole", *settings))
    run = tmp_path / "killed"
    assert kills.distil(tmp_path / "refine.yaml", run, settings) == kills.KILLS
    for name in (WEIGHTS, HEAD):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert processes.rows(run) == processes.rows(whole)


if __name__ == "__main__":
    torch.set_num_threads(1)
    in_double(setattr)
    shared, kind = Path(sys.argv[1]), sys.argv[2]
    weights = trained(shared, "two", kind, 1)
    assert torch.distributed.get_world_size() == 2 and torch.distributed.get_backend() == "gloo"
    if torch.distributed.get_rank() == 0:
        save_state(weights, shared / f"two-{kind}.safetensors")
    torch.distributed.destroy_process_group()
