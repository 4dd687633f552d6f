"""Distances with learned parts: their gradients, state and training, and the shapes for which they raise."""

import pytest
import torch
from ramps import compared, drawn, made

from fmdistill.distill.distances.pad import PAD
from fmdistill.distill.objective import Objective
from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError

LEARNED = [  # name, arguments, one image's student and teacher outputs, values an image
    ("fitnet", {}, (3, 4, 4), (2, 2, 2), (4,)),
    ("fitnet", {}, (3, 2, 2), (2, 4, 4), (16,)),
    ("fitnet", {"relu": False}, (3, 4, 3), (2, 2, 3), (6,)),
    ("fitnet", {}, (3,), (5,), ()),
    ("fitnet", {"relu": True}, (3,), (5,), ()),
    ("cc", {"width": 4}, (3,), (5,), ()),
    ("vid", {}, (3, 4, 4), (5, 2, 2), (4,)),
    ("vid", {"hidden": 6, "initial": 0.5}, (3, 2, 2), (5, 4, 4), (4,)),
    ("vid", {}, (3,), (5,), ()),
    ("pad", {}, (3, 2, 3), (3, 2, 3), (6,)),
    ("pad", {}, (3,), (3,), ()),
    ("pad", {"base": "fitnet"}, (3, 4, 4), (2, 2, 2), (4,)),
    ("pad", {"base": "fitnet"}, (3,), (5,), ()),
    ("pad", {"base": "at"}, (3, 4, 4), (5, 2, 2), (4,)),
]
BATCH = 6


def settings(name: str, arguments: dict) -> dict:
    return {"a": {"distance": {"name": name, **arguments}, "weighting": {"name": "uniform"}}}


@pytest.mark.parametrize("name, arguments, student, teacher, count", LEARNED)
def test_gradients_are_those_of_finite_differences(name, arguments, student, teacher, count):
    distance = made(name, arguments, student, teacher)
    named = dict(distance.named_parameters())
    s, t = drawn((4, *student), (4, *teacher), seed=2)

    def values(s: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(distance, dict(zip(named, parameters, strict=True)), (compared(s, t),))

    assert values(s, *named.values()).shape == (4, *count)
    assert torch.autograd.gradcheck(values, (s.requires_grad_(), *named.values()))


@pytest.mark.parametrize("name, arguments, student, teacher, count", LEARNED)
def test_learned_parameters_are_in_the_objective_s_state_and_get_a_gradient(name, arguments, student, teacher, count):
    torch.manual_seed(0)
    objective = Objective(settings(name, arguments), {"student.embedding": student, "sam.embedding": teacher})
    seen = compared(*(x.float() for x in drawn((BATCH, *student), (BATCH, *teacher))))
    losses, _ = objective(seen)
    losses["a"].backward()
    learned = dict(objective.named_parameters())
    assert learned and learned.keys() <= objective.state_dict().keys()
    assert all(name.startswith("terms.a.distance.") for name in learned)
    assert {name for name, p in learned.items() if p.grad is None or p.grad.abs().max() < 1e-5} == set()


def trained(objective: Objective, seen: Seen, steps: int) -> None:
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(seen)[0]["a"].backward()
        optimizer.step()


def test_a_few_steps_move_vid_s_variance_towards_the_gap():
    student, teacher = drawn((16, 3), (16, 2), seed=3)
    teacher = teacher * torch.tensor([0.1, 10.0])  # noise that the student cannot predict, weak and strong
    objective = Objective(settings("vid", {}), {"student.embedding": (3,), "sam.embedding": (2,)})
    trained(objective, compared(student.float(), teacher.float()), 5)
    easy, hard = objective.terms["a"].distance.variance().tolist()
    assert easy < 4.9 and hard > 5.1


def test_a_few_steps_move_pad_s_variance_towards_the_gap():
    student, noise = (x.float() for x in drawn((64, 4), (64, 4), seed=3))
    hard = student[:, 0] > 0  # the student's own output determines which samples are hard
    seen = compared(student, student + torch.where(hard, 2.0, 0.3)[:, None] * noise)
    torch.manual_seed(0)
    objective = Objective(settings("pad", {}), {"student.embedding": (4,), "sam.embedding": (4,)})
    pad = objective.terms["a"].distance
    assert isinstance(pad, PAD)
    before = pad.variance(seen)
    trained(objective, seen, 5)
    assert (pad.variance(seen) - before).abs().max() > 0.05
    trained(objective, seen, 60)
    assert pad.variance(seen)[hard].mean() > 2 * pad.variance(seen)[~hard].mean()


@pytest.mark.parametrize(
    "name, arguments, student, teacher, says",
    [
        ("fitnet", {}, (3, 5, 5), (2, 6, 6), "student's 5 x 5 map to the teacher's 6 x 6; .* half the teacher's size"),
        ("fitnet", {}, (3, 4, 4), (2,), r"has shape \(3, 4, 4\), the teacher's \(2,\); choose two maps"),
        ("fitnet", {}, (3, 4), (3, 4), "distance.name=fitnet: .* choose two maps"),
        ("vid", {}, (3,), (2, 4, 4), "distance.name=vid: .* choose two maps"),
        ("vid", {"initial": 0}, (3,), (3,), "distance.initial=0.0: expected a variance above 1e-05"),
        ("vid", {"hidden": 0}, (3,), (3,), "distance.hidden=0: expected at least 1 channel"),
        ("cc", {}, (3, 4, 4), (3, 4, 4), r"distance.name=cc: .* map \(3, 4, 4\); choose the pooled output"),
        ("cc", {"width": 0}, (3,), (3,), "distance.width=0: expected at least 1 dimension"),
        ("pad", {}, (3,), (4,), r"distance.base=l2: the student's .* \(3,\).* choose base fitnet"),
        ("pad", {"base": "fitnet"}, (3, 5, 5), (2, 6, 6), "distance.base=fitnet: cannot project"),
        ("pad", {"base": "at"}, (3,), (3,), "distance.base=at: attention is over the patches"),
        ("pad", {"base": "l3"}, (3,), (3,), "distance.base='l3': unknown. Known: at, fitnet, l2"),
        ("pad", {"clamp": 0}, (3,), (3,), "distance.clamp=0.0"),
        ("pad", {}, None, None, "PAD needs `student`, which is not known for this recipe"),
    ],
)
def test_shapes_that_no_layer_fits_raise_before_any_data_is_read(name, arguments, student, teacher, says):
    with pytest.raises(UserError, match=says):
        made(name, arguments, student, teacher)
