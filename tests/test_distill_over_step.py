"""Distances over the optimizer step: accumulation and two processes give the gradient of one. torchrun starts this."""

import itertools
import sys
from pathlib import Path

import pytest
import test_distill_processes as processes
import torch
from safetensors.torch import load_file
from test_distill_global_batch import BATCH, DIMENSIONS, Embedded, Tower, largest_difference, load
from torch import nn
from torch.nn import functional as F

from fmdistill.backbones.clip import ClipPreprocess
from fmdistill.distill.checkpoint import save_state
from fmdistill.distill.loader import batches
from fmdistill.distill.objective import Objective
from fmdistill.distill.tasks import Distill
from fmdistill.distill.train import Engine, fit, step_batches
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError
from fmdistill.teachers.output import Output

OUTPUTS = {name: Output((DIMENSIONS,)) for name in ("clip.embedding", "clip.caption")}
SRW = {"name": "srw", "temperature": 0.05}
TERMS = {
    "affinity": {"distance": {"name": "affinity", "student_scale": 8.0}, "weighting": SRW},
    "icl": {"distance": {"name": "icl"}, "weighting": SRW},
    "crd": {"distance": {"name": "crd"}, "weighting": {"name": "soft_exp"}},
    "contrastive": {"distance": {"name": "contrastive"}, "weighting": SRW, "scale": 2.0},
}


class Captioned(Embedded):
    """The same images, with captions, of which two are equal."""

    def item(self, epoch: int, shard: int, index: int) -> dict:
        item = super().item(epoch, shard, index)
        generator = torch.Generator().manual_seed(1000 + index)
        near = item["outputs"]["clip.embedding"] / 2
        item["outputs"]["clip.caption"] = torch.randn(DIMENSIONS, generator=generator) + near
        if index == 5:
            item["outputs"]["clip.caption"] = self.item(0, 0, 2)["outputs"]["clip.caption"]
        return item


def task(terms: dict = TERMS, student: type[nn.Module] = Tower) -> Distill:
    torch.manual_seed(0)
    objective = Objective(terms, logit_scale=11.0).double()
    return Distill(student(), objective, ClipPreprocess(32, 8), OUTPUTS)


def gradients(folder: Path, accumulate: int, terms: dict = TERMS) -> dict[str, torch.Tensor]:
    """The loss of the first step and the gradient of each parameter, as the loop computes them in this process."""
    engine, made = Engine(load(folder, accumulate).train), task(terms)
    rank, world, micro = engine.accelerator.process_index, engine.accelerator.num_processes, engine.micro_batch
    first = rank * BATCH // world
    places = [[(0, 0, first + part * micro + i) for i in range(micro)] for part in range(accumulate)]
    loss = 0.0
    for batch in step_batches(batches(Captioned(), places, 0), engine, made.train().shared):
        value = made(batch)["loss"] / accumulate
        value.backward()
        loss += value.detach()
    grads = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    return {"loss": loss / world, **{name: value / world for name, value in grads.items()}}


def literal() -> dict[str, torch.Tensor]:
    """The same by plain autograd, all images of the step at once, with weights from their definition."""
    made = task().train()
    samples = [Captioned().item(0, 0, index) for index in range(BATCH)]
    pixels = torch.stack([sample["pixels"] for sample in samples])
    image = made.preprocess.normalize(pixels, torch.full((BATCH, 2), 32))
    student = F.normalize(made.student(image)["embedding"], dim=1)
    raw, text = (torch.stack([s["outputs"][name].double() for s in samples]) for name in OUTPUTS)
    teacher, text = F.normalize(raw, dim=1), F.normalize(text, dim=1)
    weight = (-(teacher @ teacher.T).mean(1) / 0.05).softmax(0) * BATCH
    same = torch.eye(BATCH, dtype=torch.float64)
    same[2, 5] = same[5, 2] = 1
    target = same / same.sum(1, keepdim=True)
    learned = {name: term.distance.scale.log_scale for name, term in made.objective.items() if name != "affinity"}

    def both(scale, image_target, text_target):
        logits = scale * student @ text.T
        rows = -(image_target * logits.log_softmax(1)).sum(1)
        return rows, -(text_target * logits.T.log_softmax(1)).sum(1)

    teacher_logits = 11.0 * teacher @ text.T
    p, q = teacher_logits.softmax(1), teacher_logits.T.softmax(1)
    affinity = sum(both(8.0, p, q)) / 2
    crd = (sum(both(learned["crd"].exp(), p, q)) + (p * p.log()).sum(1) + (q * q.log()).sum(1)) / 2
    icl = both(learned["icl"].exp(), target, target)[0]
    contrastive = sum(both(learned["contrastive"].exp(), target, target)) / 2
    hard = (-crd.detach()).softmax(0) * BATCH
    loss = (weight * (affinity + icl + 2 * contrastive) + hard * crd).mean()
    loss.backward()
    grads = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def trained(recipe: Recipe, engine: Engine) -> dict[str, torch.Tensor]:
    """The weights after whole training steps of the loop."""
    made = task()
    fit(made, Captioned(), recipe, lambda model: {}, engine, made.shared)
    return made.state_dict()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights of one process with the whole batch at once."""
    recipe = load(tmp_path_factory.mktemp("alone"), 1)
    return trained(recipe, Engine(recipe.train))


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_gradient_of_a_step_is_that_of_the_formula_over_all_its_images(tmp_path, accumulate):
    expected, grads = literal(), gradients(tmp_path, accumulate)
    assert len(grads) == 1 + len(list(task().parameters()))
    assert largest_difference(grads, expected) < 1e-5  # SRW's weights are computed in float32
    assert largest_difference(grads, gradients(tmp_path, 1)) < 1e-7
    assert min(float(value.abs().max()) for value in grads.values()) > 1e-3  # or equal gradients would show nothing


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_gives_the_weights_of_the_whole_batch(tmp_path, alone, accumulate):
    recipe = load(tmp_path, accumulate)
    weights = trained(recipe, Engine(recipe.train))
    assert weights["student.proj.weight"].dtype == torch.float64
    assert largest_difference(weights, alone) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_give_the_gradients_and_the_weights_of_one(tmp_path, alone, accumulate):
    done = processes.torchrun(tmp_path, str(accumulate), script=__file__)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(tmp_path / f"gradients-{rank}.safetensors") for rank in (0, 1))
    assert largest_difference({name: first[name] + second[name] for name in first}, gradients(tmp_path, 1)) < 1e-7
    weights = [load_file(tmp_path / f"weights-{rank}.safetensors") for rank in (0, 1)]
    assert largest_difference(weights[0], weights[1]) == 0
    assert largest_difference(weights[0], alone) < 1e-6


class Random(nn.Module):
    """A student with a BatchNorm that uses the batch's statistics, and a dropout."""

    image_size, out_channels = 32, DIMENSIONS

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8), nn.Flatten(), nn.Dropout(0.5))
        self.proj = nn.Linear(8 * 16, DIMENSIONS)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": self.proj(self.net(image))}


def test_the_pass_without_gradient_gives_what_training_gives_and_leaves_no_trace(tmp_path):
    engine, made = Engine(load(tmp_path, 4).train), task(student=Random).train()
    places = [[(0, 0, 2 * part), (0, 0, 2 * part + 1)] for part in range(4)]
    before = {name: value.clone() for name, value in made.student.named_buffers()}
    seen = []
    made.student.register_forward_hook(lambda module, inputs, output: seen.append(output["embedding"].detach()))
    step = step_batches(batches(Captioned(), places, 0), engine, made.shared)
    first = next(step)
    assert len(seen) == 4 and all(torch.equal(value, before[name]) for name, value in made.student.named_buffers())
    for number, batch in enumerate(itertools.chain([first], step)):
        assert (batch["parts"], batch["first"]) == (4, 2 * number)
        made(batch)["loss"].backward()
        assert torch.equal(seen[-1], batch["whole"]["student.embedding"][2 * number : 2 * number + 2])
    assert len(seen) == 8 and int(made.student.net[1].num_batches_tracked) == 4
    assert all(p.grad is not None for p in made.parameters())


def test_a_batch_that_is_the_whole_step_or_whose_terms_need_no_other_images_takes_no_second_pass(tmp_path):
    for accumulate, terms, passes in ((1, TERMS, 1), (2, {"icl": TERMS["icl"]}, 2), (2, TERMS, 4)):
        engine, made, count = Engine(load(tmp_path, accumulate).train), task(terms), []
        made.student.register_forward_hook(lambda *_, count=count: count.append(1))
        micro = engine.micro_batch
        places = [[(0, 0, part * micro + i) for i in range(micro)] for part in range(accumulate)]
        for batch in step_batches(batches(Captioned(), places, 0), engine, made.shared):
            made(batch)
        assert len(count) == passes


def test_weights_by_key_of_a_divided_step_are_refused(tmp_path):
    (tmp_path / "weights.json").write_text(str({str(n): 1.0 for n in range(24)}).replace("'", '"'))
    by_key = {"name": "by_key", "weights": str(tmp_path / "weights.json")}
    terms = {"contrastive": {"distance": {"name": "contrastive"}, "weighting": by_key}}
    assert gradients(tmp_path, 1, terms)["loss"] > 0
    with pytest.raises(UserError, match=r"weighs by the images' keys, .*train\.accumulate=1, or weigh another term"):
        gradients(tmp_path, 2, terms)


def main(folder: Path, accumulate: int) -> None:
    """Do both in this process, one of two, and write down what it made."""
    grads = gradients(folder, accumulate)
    recipe = load(folder, accumulate)
    weights = trained(recipe, Engine(recipe.train))
    assert torch.distributed.get_world_size() == 2 and torch.distributed.get_backend() == "gloo"
    rank = torch.distributed.get_rank()
    save_state(grads, folder / f"gradients-{rank}.safetensors")
    save_state(weights, folder / f"weights-{rank}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
