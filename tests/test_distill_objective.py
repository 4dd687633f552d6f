"""Distances and SRW against brute-force formulas, weights of mean one, and the reduction."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fmdistill.distill.distances import DISTANCES
from fmdistill.distill.objective import Objective, effective_sample_size, reduce
from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings import WEIGHTINGS
from fmdistill.distill.weightings.similarity import average_similarity, sample_similarity
from fmdistill.distill.weightings.srw import SRW
from fmdistill.registry import UserError, bind

GOLDEN = Path(__file__).parent.parent.parent / "shared/reference/kd_golden_values.json"


def brute_force(feature_CN: np.ndarray, valid_N: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 4 to 6 pair by pair, in float64."""
    columns = feature_CN.astype(np.float64).T
    n = len(columns)
    cosine = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in columns] for a in columns])
    similarity = np.array([sum(cosine[i, j] for j in range(n) if valid_N[j]) / valid_N.sum() for i in range(n)])
    raw = np.array([np.exp(-similarity[i] / temperature) if valid_N[i] else 0.0 for i in range(n)])
    return similarity, raw / raw.sum()


@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("padded", [False, True])
def test_srw_equals_the_pairwise_formula(temperature, padded):
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(3, 16, 36, generator=generator) + torch.randn(3, 16, 1, generator=generator)
    valid = torch.ones(3, 36, dtype=torch.bool)
    if padded:
        valid[0, 24:], valid[1, ::6] = False, False
    similarity, weights = (
        average_similarity(feature, valid),
        SRW(temperature).weights(average_similarity(feature, valid), valid),
    )
    for b in range(3):
        expected_similarity, expected = brute_force(feature[b].numpy(), valid[b].numpy(), temperature)
        np.testing.assert_allclose(similarity[b], expected_similarity, atol=1e-6)
        np.testing.assert_allclose(weights[b] / valid[b].sum(), expected, atol=1e-6)
    assert (weights[~valid] == 0).all()
    torch.testing.assert_close((weights * valid).sum(1) / valid.sum(1), torch.ones(3))


def test_srw_equals_the_published_golden_values():
    if not GOLDEN.is_file():
        pytest.skip("the reference values are not beside this checkout")
    golden = json.loads(GOLDEN.read_text())
    k = np.arange(8 * 16, dtype=np.float64)
    feature = (np.sin(0.41 * k + 1.1) * np.cos(0.013 * k * k + 1.1)).astype(np.float32).reshape(8, 16)
    tokens = torch.from_numpy(feature).T[None]
    valid = torch.ones(1, 8, dtype=torch.bool)
    np.testing.assert_allclose(average_similarity(tokens, valid)[0], golden["srw.avesim"], atol=1e-6)
    np.testing.assert_allclose(
        SRW(0.5).weights(average_similarity(tokens, valid), valid)[0] / 8, golden["srw.w tau=0.5"], atol=1e-6
    )
    samples = torch.from_numpy(feature)
    np.testing.assert_allclose(
        SRW(0.5).weights(*sample_similarity(samples, samples))[0] / 8, golden["srw.w tau=0.5"], atol=1e-6
    )


def compared(student: torch.Tensor, teacher: torch.Tensor) -> Seen:
    return Seen({"student.embedding": student, "sam.embedding": teacher}, output="embedding")


def seen(valid_rows: int = 2) -> Seen:
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(2, 5, 4, 4, generator=generator).requires_grad_()
    teacher = torch.randn(2, 5, 4, 4, generator=generator)
    valid = torch.zeros(2, 4, 4, dtype=torch.bool)
    valid[:, :valid_rows] = True
    grids = {"sam.embedding": valid.flatten(1)}
    return Seen({"student.embedding": student, "sam.embedding": teacher}, grids=grids)


@pytest.mark.parametrize("padding", ["include", "exclude"])
def test_the_objective_is_the_weighted_mean_spelled_out(padding):
    view = seen()
    settings = {"distance": {"name": "mse"}, "weighting": {"name": "srw", "temperature": 0.3}, "padding": padding}
    losses, statistics = Objective({"a": {**settings, "scale": 2.0}})(view)
    s, t = (x.detach().flatten(2).numpy() for x in view.outputs.values())
    total = 0.0
    for b in range(2):
        valid = view.grids["sam.embedding"][b].numpy() if padding == "exclude" else np.ones(16, bool)
        _, weight = brute_force(t[b], valid, 0.3)
        total += sum(weight[i] * ((s[b, :, i] - t[b, :, i]) ** 2).mean() for i in range(16) if valid[i])
    np.testing.assert_allclose(losses["a"].item(), 2.0 * total / 2, rtol=1e-5)
    assert 0 < statistics["a/effective_sample_size"] < 1 < statistics["a/largest_weight"]
    losses["a"].backward()
    gradient = view.outputs["student.embedding"].grad
    assert (gradient[:, :, 2:].abs().sum() > 0) == (padding == "include")


def test_padding_can_be_included_but_not_excluded_on_another_grid():
    view = seen()
    pooled = {name: torch.nn.functional.avg_pool2d(value, 2) for name, value in view.outputs.items()}
    settings = {"distance": {"name": "mse"}, "weighting": {"name": "uniform"}}
    losses, _ = Objective({"a": settings})(Seen(pooled, grids=view.grids))
    torch.testing.assert_close(losses["a"], torch.nn.functional.mse_loss(*pooled.values()))
    with pytest.raises(UserError, match="has 4 patches per image, but padding is known for 16 patches"):
        Objective({"a": {**settings, "padding": "exclude"}})(Seen(pooled, grids=view.grids))


def test_uniform_weights_reproduce_the_plain_mean():
    view = seen(4)
    losses, statistics = Objective({"a": {"distance": {"name": "mse"}, "weighting": {"name": "uniform"}}})(view)
    torch.testing.assert_close(losses["a"], torch.nn.functional.mse_loss(*view.outputs.values()))
    assert statistics["a/effective_sample_size"] == 1


class Given:
    """A custom weighting: the value of the expression `make`."""

    def __init__(self, make: str) -> None:
        self.make = make

    def __call__(self, distance: torch.Tensor, seen: Seen) -> torch.Tensor:
        return eval(self.make, {"distance": distance, "valid": seen.valid, "torch": torch})


def weighed(make: str) -> Objective:
    weighting = {"name": "test_distill_objective:Given", "make": make}
    return Objective({"map": {"distance": {"name": "mse"}, "weighting": weighting, "padding": "exclude"}})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        ("torch.ones(2)", r"returned \(2,\); expected weights of the distance's shape \(2, 16\)"),
        ("torch.ones(2, 1)", r"returned \(2, 1\); expected .* \(2, 16\)"),
        ("1.0", "returned float; expected .*"),
        ("distance * torch.inf", "returned weights that are not finite"),
    ],
)
def test_a_weighting_that_returns_no_weights_is_named(make, says):
    with pytest.raises(UserError, match=rf"^objective\.map\.weighting=test_distill_objective:Given: {says}") as error:
        weighed(make)(seen())
    assert "\n" not in str(error.value)


def test_a_custom_weighting_whose_mean_is_not_one_is_logged_once(caplog):
    odd = weighed("2.0 * valid")
    for _ in range(3):
        odd(seen())
    weighed("valid.float()")(seen())
    Objective({"map": {"distance": {"name": "mse"}, "weighting": {"name": "srw"}, "padding": "exclude"}})(seen())
    (warning,) = caplog.messages
    assert warning.startswith(
        "objective.map.weighting=test_distill_objective:Given: the mean weight of the first batch is 2,"
    )


def test_reduce_is_per_image_then_over_the_batch():
    valid = torch.tensor([[True, True, True, False], [True, False, False, False]])
    values = torch.tensor([[1.0, 2.0, 3.0, 0.0], [8.0, 0.0, 0.0, 0.0]])
    assert reduce(values, valid) == (2.0 + 8.0) / 2
    assert effective_sample_size(torch.tensor([[2.0, 1.0, 0.0, 0.0]]), valid[:1]) == pytest.approx(9 / (3 * 5))


def test_srw_names_an_output_that_it_cannot_weigh():
    vectors = Seen({"student.embedding": torch.zeros(4, 8), "clip.embedding": torch.ones(4, 8)})
    with pytest.raises(UserError, match=r"output=embeding: the student has no such output\. Did you mean 'embedding'"):
        vectors.focus("embeding", "include").pair()
    with pytest.raises(UserError, match="has no term"):
        Objective({})
    with pytest.raises(UserError, match="nothing to weigh within an image; use global_batch or batch"):
        SRW(group="image")(torch.zeros(4), vectors.focus("embedding", "include"))
    with pytest.raises(UserError, match="patches are not exchanged between processes; use image or batch"):
        SRW(group="global_batch")(torch.zeros(2, 16), seen().focus("embedding", "include"))
    with pytest.raises(UserError, match=r"group='images': unknown\. Did you mean 'image'"):
        bind({"name": "srw", "group": "images"}, WEIGHTINGS, "objective.a.weighting")
    outputs = {"clip.embedding": torch.ones(2, 8), "clip.tokens": torch.ones(2, 8, 2, 2)}
    both = Seen(outputs, grids={"clip.tokens": torch.ones(2, 4) > 0})
    with pytest.raises(
        UserError, match="tokens: has one vector per patch, but output=embedding has one vector per image"
    ):
        SRW(feature="tokens")(torch.zeros(2), both.focus("embedding", "include"))


def test_distances_are_the_formulas_spelled_out():
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 3, 7, generator=generator)
    s, t = student.double().numpy(), teacher.double().numpy()
    unit_s, unit_t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t))
    expected = {
        "plain": ({"name": "mse"}, ((s - t) ** 2).mean(1)),
        "unit": ({"name": "mse", "normalize": True}, ((unit_s - unit_t) ** 2).mean(1)),
        "cosine": ({"name": "cosine"}, 1 - (unit_s * unit_t).sum(1)),
    }
    for settings, values in expected.values():
        distance = bind(settings, DISTANCES, "distance")()
        np.testing.assert_allclose(distance(compared(student, teacher)), values, rtol=1e-5)
        as_maps = distance(compared(student.T[None, :, None], teacher.T[None, :, None]))  # (1, 7, 1, 3): three patches
        np.testing.assert_allclose(as_maps, values[None], rtol=1e-5)
    with pytest.raises(UserError, match=r"has shape \(7,\), the teacher's \(6,\)"):
        DISTANCES["cosine"]()(compared(student, teacher[:, :6]))


def test_half_precision_outputs_are_compared_in_float32_and_double_ones_in_double():
    plain = Objective({"a": {"distance": {"name": "mse"}, "weighting": {"name": "uniform"}}})
    half = torch.full((4, 8), 1.0, dtype=torch.bfloat16)
    losses, _ = plain(Seen({"student.embedding": half, "clip.embedding": torch.full((4, 8), 1.001)}))
    assert losses["a"].dtype == torch.float32 and losses["a"].item() == pytest.approx(1e-6, rel=1e-3)
    losses, _ = plain(Seen({"student.embedding": half.double(), "clip.embedding": torch.ones(4, 8) + 1e-6}))
    assert losses["a"].dtype == torch.float64


def vectors_of(count: int, group: str | None = None, temperature: float = 0.1) -> tuple[torch.Tensor, np.ndarray, SRW]:
    """Return teacher vectors with one common direction, the pairwise formula's weights, and the weighting."""
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(count, 16, generator=generator) + 0.5
    _, expected = brute_force(teacher.T.numpy(), np.ones(count, bool), temperature)
    return teacher, expected * count, SRW(temperature=temperature, group=group)  # type: ignore[arg-type]


def test_srw_weighs_the_samples_of_a_batch_by_the_pairwise_formula():
    teacher, expected, srw = vectors_of(12, "batch")
    weight = srw(torch.zeros(12), Seen({"clip.embedding": teacher}, output="embedding"))
    np.testing.assert_allclose(weight, expected, rtol=1e-5)
    assert weight.mean().item() == pytest.approx(1, rel=1e-5) and weight.max() > 1.2


def test_srw_weighs_a_slice_of_the_global_batch_as_the_whole_does():
    teacher, expected, srw = vectors_of(12)
    whole = {"clip.embedding": teacher}
    for rows in (slice(0, 4), slice(4, 12)):
        part = Seen({"clip.embedding": teacher[rows]}, output="embedding", whole=whole)
        np.testing.assert_allclose(srw(torch.zeros(len(teacher[rows])), part), expected[rows], rtol=1e-5)
        alone = SRW(0.1, group="batch")(torch.zeros(len(teacher[rows])), part)
        assert np.abs(alone.numpy() - expected[rows]).max() > 0.05


def test_srw_weighs_small_temperatures_without_overflow():
    teacher, expected, srw = vectors_of(12, "batch", temperature=0.002)
    weight = srw(torch.zeros(12), Seen({"clip.embedding": teacher}, output="embedding"))
    assert torch.isfinite(weight).all() and weight.mean().item() == pytest.approx(1, rel=1e-4)


def test_srw_can_weigh_the_patches_of_all_images_as_one_group():
    view = seen().focus("embedding", "exclude")
    weight = SRW(0.3, group="batch")(torch.zeros(2, 16), view)
    feature, valid = view.teacher("embedding").flatten(2), view.valid.flatten().numpy()
    _, expected = brute_force(torch.cat(list(feature), 1).numpy(), valid, 0.3)
    np.testing.assert_allclose(weight.flatten(), expected * valid.sum(), rtol=1e-4, atol=1e-6)


WHOLE = {"mse": {}, "cosine": {}, "fitnet": {}, "at": {}, "vid": {}, "pad": {}}
RARE = ("uniform", "srw", "sum_normalizer", "soft_exp", "soft_poly", "hard_mining", "hard_discarding")
RARE += ("regional_srw", "region_balance")


@pytest.mark.parametrize("weighting", RARE)
@pytest.mark.parametrize("distance", WHOLE)
def test_excluded_padding_does_not_depend_on_the_teacher_s_padded_patches(distance, weighting):
    """Thus a trimmed cache, in which padded patches are zero, works with every distance and weighting of patches."""
    shape, valid = (6, 4, 4), torch.zeros(3, 4, 4, dtype=torch.bool)
    valid[0, :3], valid[1, :, :2], valid[2] = True, True, True
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, *shape, generator=generator) for _ in range(2))
    settings = {"distance": {"name": distance}, "weighting": {"name": weighting}}
    shapes = {"student.embedding": shape, "sam.embedding": shape}
    losses, gradients = {}, {}
    for padding in ("exclude", "include"):
        for kind, value in (("full", teacher), ("trimmed", teacher * valid[:, None])):
            torch.manual_seed(0)
            objective = Objective({"a": {**settings, "padding": padding}}, shapes)
            moved = student.clone().requires_grad_()
            named = {"student.embedding": moved, "sam.embedding": value}
            loss = objective(Seen(named, keys=["a", "b", "c"], grids={"sam.embedding": valid.flatten(1)}))[0]["a"]
            loss.backward()
            losses[padding, kind], gradients[padding, kind] = loss.detach(), moved.grad
    assert torch.equal(losses["exclude", "full"], losses["exclude", "trimmed"])
    assert torch.equal(gradients["exclude", "full"], gradients["exclude", "trimmed"])
    assert not torch.allclose(losses["include", "full"], losses["include", "trimmed"], rtol=1e-4)
