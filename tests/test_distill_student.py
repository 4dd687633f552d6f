"""Students that start from other students' weights, and loading a finished student."""

import shutil

import pytest
import torch
import toy_digits
from safetensors.torch import save_file

from fmdistill import distill, pipeline, recipe
from fmdistill.distill import student as students
from fmdistill.distill import tasks
from fmdistill.registry import UserError

NARROW = {"name": "digits_resnet", "width": 2}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Make a folder with a recipe and its finished run."""
    folder = tmp_path_factory.mktemp("students")
    path, _ = toy_digits.write(folder)
    distill.run(recipe.load(path, ["train.steps=4", f"out={folder}/first"]))
    return folder


def load(folder, *overrides):
    return recipe.load(folder / "teacher.yaml", ["train.steps=2", f"out={folder}/second", *overrides])


def same(one, other):
    return all(torch.equal(one.state_dict()[name], value) for name, value in other.state_dict().items())


@pytest.mark.parametrize("start", ["first", "first/student.safetensors"])
def test_a_student_starts_from_a_run_or_a_file(first, start):
    settings = load(first, f"student.pretrained={first}/{start}")
    job = tasks.build(settings)
    assert job.student.training and same(job.student, distill.load_student(first / "first"))
    assert not same(students.build_untrained(settings.student), job.student)


def test_none_and_null_are_no_start(first):
    untrained = tasks.build(load(first)).student
    for value in ("none", "null"):
        settings = load(first, f"student.pretrained={value}")
        pipeline.check(settings)
        assert same(tasks.build(settings).student, untrained)


def test_a_second_stage_trains_on_and_opens_when_the_first_is_gone(first):
    shutil.copytree(first / "first", first / "copy")
    settings = load(first, f"student.pretrained={first}/copy", "optimizer.lr=1e-6")
    out = distill.run(settings)
    start = distill.load_student(first / "copy").state_dict()
    shutil.rmtree(first / "copy")
    ended = distill.load_student(out)
    gap = max(float((start[name] - value.detach()).abs().max()) for name, value in ended.named_parameters())
    assert 0 < gap < 1e-3  # so small a rate leaves it where it started
    assert distill.run(settings) == out  # finished, so nothing looks for what it started from
    again = students.load_checkpoint(settings.student, out / students.WEIGHTS)
    assert same(again, ended) and not again.training


def test_a_start_that_is_missing_or_does_not_fit_is_one_clear_line(first, tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "text.safetensors").write_text("no tensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    for start in ("nowhere", "unfinished"):
        with pytest.raises(UserError, match=f"student.pretrained=.*{start}: no finished run or file; train") as error:
            students.build({**NARROW, "pretrained": str(tmp_path / start)})
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"student.pretrained=.*text.safetensors: not a readable checkpoint"):
        students.build({**NARROW, "pretrained": str(tmp_path / "text.safetensors")})
    for start in (tmp_path / "other.safetensors", first / "first"):
        with pytest.raises(UserError, match=f"student.pretrained={start}: does not contain this student") as error:
            students.build({**NARROW, "pretrained": str(start)})
        assert "the same digits_resnet" in str(error.value) and "\n" not in str(error.value)


def test_checking_binds_and_looks_for_nothing(first):
    pipeline.check(load(first, f"student.pretrained={first}/not/yet/trained"))
    students.check({"name": "tinyvit_sam_mini", "pretrained": "no.pt"})  # its own setting
    for settings, says in (
        ({**NARROW, "pretrained": "a", "widht": 2}, "student.widht: no such setting.*Did you mean 'width'"),
        ({**NARROW, "pretrained": 3}, "student.pretrained=3: expected"),
        ({"name": "digits_resnt", "pretrained": "a"}, "student.name: unknown name 'digits_resnt'"),
        ({"pretrained": "a"}, "student: needs a `name`"),
        ({"name": "tinyvit_sam_mini", "pretrained": 3}, "student.pretrained=3: expected str"),
    ):
        with pytest.raises(UserError, match=says):
            students.check(settings)


def test_frozen_parts_do_not_change_and_the_rest_is_trained(first):
    settings = load(first, f"student.pretrained={first}/first", "student.freeze=[network.stem, network.head.weight]")
    job = tasks.build(settings)
    names = [name for name, parameter in job.student.named_parameters() if not parameter.requires_grad]
    assert names and all(name.startswith("network.stem.") or name == "network.head.weight" for name in names)
    start = distill.load_student(first / "first").state_dict()
    ended = distill.load_student(distill.run(recipe.dataclasses.replace(settings, out=f"{first}/frozen"))).state_dict()
    frozen = {name for name in start if name in names or name.startswith("network.stem.")}  # BatchNorm's statistics too
    assert any("running_mean" in name for name in frozen)
    assert all(torch.equal(start[name], ended[name]) for name in frozen)
    changed = {name for name in start if not torch.equal(start[name], ended[name])}
    assert changed and not changed & frozen


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("[network.stm]", "nothing is called 'network.stm'. Did you mean 'network.stem'"),
        ("5", "student.freeze=5"),
        ('[""]', "nothing is called ''"),
    ],
)
def test_a_wrong_freeze_is_one_line(first, names, message):
    with pytest.raises(UserError, match=message):
        tasks.build(load(first, f"student.freeze={names}"))


def test_freezing_the_whole_student_is_refused(first):
    student = students.build({"name": "digits_resnet"})
    with pytest.raises(UserError, match="freezes the whole student"):
        students.freeze(student, [name for name, _ in student.named_children()])


@pytest.mark.parametrize("start", ["missing.safetensors", "runs/missing"])
def test_a_start_that_does_not_exist_is_refused_before_any_work(first, start):
    with pytest.raises(UserError, match=rf"student.pretrained=.*{start}: no such file or finished run"):
        pipeline.check_before(load(first, f"student.pretrained={first}/{start}", f"out={first}/third"))
