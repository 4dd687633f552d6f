"""The global batch: two processes give the loss and gradients of one with the whole batch. torchrun starts this too."""

import sys
from pathlib import Path

import pytest
import test_distill_processes as processes
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

from fmdistill.backbones.clip import ClipPreprocess
from fmdistill.cache.batch import sample
from fmdistill.cache.prepare import PreparedImage
from fmdistill.distill.checkpoint import save_state
from fmdistill.distill.loader import batches
from fmdistill.distill.objective import Objective
from fmdistill.distill.seen import Seen
from fmdistill.distill.tasks import Distill, vectors
from fmdistill.distill.train import Engine, fit, step_batches
from fmdistill.recipe import Recipe
from fmdistill.teachers.output import Output

IMAGES, BATCH, DIMENSIONS, STEPS = 24, 8, 16, 3


class Embedded:
    """Images and teacher vectors with one common direction, made from their number."""

    counts = (IMAGES,)

    def item(self, epoch: int, shard: int, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator)
        return {
            **sample(PreparedImage(str(index), "train-000", None, pixels, (32, 32), (32, 32))),
            "outputs": {"clip.embedding": torch.randn(DIMENSIONS, generator=generator) + 0.5},
            "student": torch.randn(DIMENSIONS, generator=generator),
        }


class Tower(nn.Module):
    """A small student in float64 whose BatchNorm is frozen: its statistics would be those of a micro-batch."""

    image_size, out_channels = 32, DIMENSIONS

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten())
        self.proj = nn.Linear(8 * 16, DIMENSIONS, bias=False)
        self.double()

    def train(self, mode: bool = True):
        super().train(mode)
        self.net[1].eval()
        return self

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {"embedding": (B, D)}."""
        return {"embedding": self.proj(self.net(image.double()))}


def objective(group: str) -> Objective:
    weighting = {"name": "srw", "temperature": 0.1, "group": group}
    return Objective({"embedding": {"distance": {"name": "mse"}, "weighting": weighting}})


def on_fixed_features(engine: Engine, group: str) -> dict[str, torch.Tensor]:
    """The objective's loss and the gradient of each student feature, summed as the loop does: {"loss", key: (D,)}."""
    rank, world, micro = engine.accelerator.process_index, engine.accelerator.num_processes, engine.micro_batch
    accumulate, found = engine.settings.accumulate, {"loss": torch.zeros(())}
    first = rank * BATCH // world
    places = [[(0, 0, first + part * micro + i) for i in range(micro)] for part in range(accumulate)]
    for batch in step_batches(batches(Embedded(), places, 0), engine, vectors):
        student = batch["student"].requires_grad_()
        seen = Seen({"student.embedding": student, **batch["outputs"]}, whole=batch["whole"])
        loss = objective(group)(seen)[0]["embedding"] / accumulate
        loss.backward()
        found["loss"] += loss.detach() / world
        found |= {key: row / world for key, row in zip(batch["keys"], student.grad, strict=True)}
    return found


def trained(recipe: Recipe, engine: Engine, group: str) -> dict[str, torch.Tensor]:
    """The weights after whole training steps of the loop."""
    torch.manual_seed(0)
    task = Distill(Tower(), objective(group), ClipPreprocess(32, 8), {"clip.embedding": Output((8,))})
    fit(task, Embedded(), recipe, lambda model: {}, engine, vectors)
    return task.state_dict()


def load(folder: Path, accumulate: int) -> Recipe:
    folder.mkdir(exist_ok=True)
    own = [f"train.batch_size={BATCH}", f"train.steps={STEPS}", f"train.accumulate={accumulate}"]
    return tiny.load(folder, *own, "train.clip=0.1", f"train.checkpoint_every={STEPS}")


def both(folder: Path, accumulate: int, group: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    recipe = load(folder, accumulate)
    engine = Engine(recipe.train)
    return on_fixed_features(engine, group), trained(recipe, engine, group)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What one process finds with the whole batch at once."""
    return both(tmp_path_factory.mktemp("alone"), 1, "global_batch")


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).abs().max()) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_give_the_loss_the_gradients_and_the_weights_of_one(tmp_path, alone, accumulate):
    done = processes.torchrun(tmp_path, str(accumulate), "global_batch", script=__file__)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(tmp_path / f"features-{rank}.safetensors") for rank in (0, 1))
    assert (len(first), len(second)) == (1 + BATCH // 2, 1 + BATCH // 2)
    joined = {**first, **second, "loss": first["loss"] + second["loss"]}
    assert largest_difference(joined, alone[0]) < 1e-6
    weights = [load_file(tmp_path / f"weights-{rank}.safetensors") for rank in (0, 1)]
    assert largest_difference(weights[0], weights[1]) == 0
    assert weights[0]["student.proj.weight"].dtype == torch.float64
    assert largest_difference(weights[0], alone[1]) < 1e-6


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_accumulation_gives_the_loss_the_gradients_and_the_weights_of_the_whole_batch(tmp_path, alone, accumulate):
    features, weights = both(tmp_path / "global", accumulate, "global_batch")
    assert largest_difference(features, alone[0]) < 1e-6 and largest_difference(weights, alone[1]) < 1e-6
    features, weights = both(tmp_path / "batch", accumulate, "batch")
    far = [largest_difference(features, alone[0]) > 1e-3, largest_difference(weights, alone[1]) > 1e-4]
    assert far == [accumulate > 1] * 2  # so the comparison above can fail


def test_without_shared_outputs_micro_batches_are_loaded_one_by_one(tmp_path):
    loaded = []

    def parts():
        for number in range(9):
            loaded.append(number)
            yield {"x": torch.tensor([number]), "keys": [str(number)]}

    source, engine = parts(), Engine(load(tmp_path, 4).train)
    step = step_batches(source, engine, None)
    assert next(step)["whole"] == {} and loaded == [0]
    assert [int(batch["x"]) for batch in step] == [1, 2, 3] and loaded == [0, 1, 2, 3]
    step = step_batches(source, engine, lambda batch: {"x": batch["x"]})
    assert next(step)["whole"]["x"].tolist() == [4, 5, 6, 7] and loaded == list(range(8))


def main(folder: Path, accumulate: int, group: str) -> None:
    """Do both in this process, one of two, and write down what it found."""
    features, weights = both(folder, accumulate, group)
    assert torch.distributed.get_world_size() == 2 and torch.distributed.get_backend() == "gloo"
    rank = torch.distributed.get_rank()
    save_state({name: value.clone() for name, value in features.items()}, folder / f"features-{rank}.safetensors")
    save_state(weights, folder / f"weights-{rank}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
