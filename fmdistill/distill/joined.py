"""Train one student for several teachers: each teacher's job joined to one, with a trunk that their students share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fmdistill.cache.batch import Batch, Data, Place
from fmdistill.cache.dataset import CachedImages
from fmdistill.distill.job import Job
from fmdistill.logs import log
from fmdistill.registry import UserError

TRUNK = "trunk"  # the part of a student that the others share


def join(jobs: Mapping[str, Job]) -> Job:
    """Return one job for the jobs of several teachers, by name; their students share the first one's trunk.

    Each step sums the losses of all teachers for the same images, each image prepared as each teacher's student sees
    it. Raises UserError if the trunks differ, or if the caches have no image in common.
    """
    share_trunk({name: job.student for name, job in jobs.items()})
    task, student = SeveralTeachers({name: job.task for name, job in jobs.items()}), _Students(jobs)
    train, validation = (
        _images({n: j.train for n, j in jobs.items()}),
        _images({n: j.validation for n, j in jobs.items()}),
    )

    def shared(batch: Batch) -> dict[str, Tensor]:
        """Return what each job shares, its names prefixed with the job's."""
        return {
            f"{name}/{key}": value
            for name, job in jobs.items()
            if job.shared is not None
            for key, value in job.shared({**_views(batch)[name], "parts": batch.get("parts", 1)}).items()
        }

    def complete(batch: Batch) -> Batch:
        """Return the batch with each teacher's outputs in its view."""
        assert "stored_views" in batch, "this batch was not read from caches"
        views, stored = _views(batch), batch["stored_views"]
        filled = batch.copy()
        filled["views"] = {}
        for name, job in jobs.items():
            assert job.complete is not None, f"{name} has no teacher"
            filled["views"][name] = job.complete({**views[name], "stored": stored[name]})
        del filled["stored_views"]
        return filled

    def finish() -> None:
        for job in jobs.values():
            if job.finish is not None:
                job.finish()

    shares = any(job.shared is not None for job in jobs.values())
    return Job(task, student, train, validation, shared if shares else None, complete, finish, jobs)


class SeveralTeachers(nn.Module):
    """The tasks of several teachers as one, whose loss is the sum of theirs."""

    def __init__(self, tasks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.tasks = nn.ModuleDict(tasks)
        save_once(self)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss": the sum, and each task's losses and statistics as "teacher/name"}."""
        losses: dict[str, Tensor] = {}
        for name, task in self.tasks.items():
            own = {"epoch": batch.get("epoch"), "progress": batch.get("progress"), "first": batch.get("first", 0)}
            view: Any = {**_views(batch)[name], **own}
            if prefix_removed := {
                key.removeprefix(f"{name}/"): value
                for key, value in (batch.get("whole") or {}).items()
                if key.startswith(f"{name}/")
            }:
                view["whole"] = prefix_removed
            losses |= {f"{name}/{key}": value for key, value in task(view).items()}
        total = torch.stack([losses[f"{name}/loss"] for name in self.tasks]).sum()
        return {"loss": total, **losses}


class _Students(nn.Module):
    """The students of several teachers, for one file of weights in which the shared trunk is stored once."""

    def __init__(self, jobs: Mapping[str, Job]) -> None:
        super().__init__()
        self.students = nn.ModuleDict({name: job.student for name, job in jobs.items()})
        save_once(self)


def _views(batch: Batch) -> dict[str, Batch]:
    assert "views" in batch, "this batch is for one teacher"
    return batch["views"]


def share_trunk(students: Mapping[str, nn.Module]) -> None:
    """Replace the parameters of each student's trunk by those of the first student's trunk that have the same name.

    Buffers, such as BatchNorm's statistics, are not shared, since each teacher's images have another size. Raises
    UserError if a student has no trunk, or if the parameters' names or shapes differ.
    """
    (first, reference), *others = students.items()
    shared = dict(_trunk(first, reference).named_parameters())
    for name, student in others:
        trunk = _trunk(name, student)
        own = {key: value for key, value in trunk.named_parameters() if key in shared}
        differing = [key for key, value in own.items() if value.shape != shared[key].shape]
        missing = [key for key in shared if key not in own]
        if differing or missing:
            raise UserError(
                f"teachers.{name}.student: its trunk does not fit that of teachers.{first}.student, {len(differing)} "
                f"shapes differ and {len(missing)} names are missing, first {(differing + missing)[0]}; choose "
                "students of the same backbone and size"
            )
        for key in own:
            module, _, attribute = key.rpartition(".")
            setattr(trunk.get_submodule(module), attribute, shared[key])
        total, once = sum(p.numel() for p in student.parameters()), sum(shared[key].numel() for key in own)
        log.info("teachers.%s.student: shares %.2f of its %.2f M parameters", name, once / 1e6, total / 1e6)


def _trunk(name: str, student: nn.Module) -> nn.Module:
    trunk = getattr(student, TRUNK, None)
    if not isinstance(trunk, nn.Module):
        raise UserError(
            f"teachers.{name}.student: {type(student).__name__} has no trunk that students could share; use one such "
            f"as tinyvit_sam and tinyvit_clip"
        )
    return trunk


def save_once(module: nn.Module) -> None:
    """Store each shared parameter of `module` once in its state dict, under its first name, and load it from there."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    repeated = {
        name: first[id(parameter)]
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if first[id(parameter)] != name
    }

    def leave_out(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        for name in repeated:
            state.pop(f"{prefix}{name}", None)

    def fill_in(_module: nn.Module, state: dict[str, Any], prefix: str, *_others: Any) -> None:
        for name, original in repeated.items():
            if f"{prefix}{original}" in state:
                state[f"{prefix}{name}"] = state[f"{prefix}{original}"]

    module.register_state_dict_post_hook(leave_out)
    module.register_load_state_dict_pre_hook(fill_in)


def _images(data: Mapping[str, Data]) -> "JoinedImages":
    parts = {}
    for name, part in data.items():
        assert isinstance(part, CachedImages), f"teachers.{name} is not cached"
        parts[name] = part
    return JoinedImages(parts)


@dataclass(frozen=True)
class JoinedImages:
    """The images that all of several caches hold, each prepared for every teacher.

    A sample has its key, shard and label, and under "views" the sample of each cache.
    """

    parts: Mapping[str, CachedImages]

    @cached_property
    def places(self) -> list[dict[str, list[int]]]:
        """For each shard, the index in each cache of every image that all of them hold."""
        (first, reference), *others = self.parts.items()
        joined = []
        for shard, reader in enumerate(reference.shards):
            index_of = {
                name: {key: index for index, key in enumerate(part.shards[shard].keys)} for name, part in others
            }
            common = [
                (index, key) for index, key in enumerate(reader.keys) if all(key in own for own in index_of.values())
            ]
            joined.append(
                {first: [index for index, _ in common]}
                | {name: [own[key] for _, key in common] for name, own in index_of.items()}
            )
        return joined

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of images of each shard that all caches hold."""
        return tuple(len(next(iter(indices.values()))) for indices in self.places)

    def item(self, epoch: int, shard: int, index: int) -> dict[str, Any]:
        """Return one image as each teacher's student sees it, without the teachers' outputs."""
        views = {name: part.item(epoch, shard, self.places[shard][name][index]) for name, part in self.parts.items()}
        named = next(iter(views.values()))
        return {**{key: named[key] for key in ("keys", "shards", "labels", "label_values")}, "views": views}

    def read_batch(self, places: Sequence[Place]) -> dict[str, Any]:
        """Return each cache's outputs of `places` as they are stored."""
        own = {
            name: [(epoch, shard, self.places[shard][name][index]) for epoch, shard, index in places]
            for name in self.parts
        }
        return {"stored_views": {name: part.read_batch(own[name])["stored"] for name, part in self.parts.items()}}
