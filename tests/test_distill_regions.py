"""Regions of an image and the weightings by them, against literal formulas in float64."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fmdistill.distill import objective
from fmdistill.distill.objective import Objective
from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.region_balance import RegionBalance
from fmdistill.distill.weightings.regional_srw import RegionalSRW
from fmdistill.distill.weightings.regions import divide
from fmdistill.registry import UserError

# Legend: B images, C channels, N patches per image, R regions of an image.

B, C, SIDE = 5, 7, 6
N = SIDE * SIDE
VALID = torch.arange(N) < torch.tensor([N, 30, 17, 6, 1])[:, None]  # the last one has fewer patches than regions
ZEROS = torch.zeros(B, N)


def teacher(seed: int = 0) -> torch.Tensor:
    return torch.randn(B, C, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) + 0.4


def seen(embedding: torch.Tensor, valid: torch.Tensor = VALID) -> Seen:
    return Seen({"t.embedding": embedding}, valid, "embedding")


def units(embedding: torch.Tensor) -> torch.Tensor:
    return F.normalize(embedding.flatten(2), dim=1) * VALID[:, None]


def literal_regions(feature_NC: np.ndarray, count: int) -> np.ndarray:
    """The number of each patch's anchor, by loops over patches and anchors."""
    unit_NC = feature_NC.astype(np.float64)
    unit_NC /= np.linalg.norm(unit_NC, axis=1, keepdims=True)
    mean_C = sum(unit_NC) / len(unit_NC)
    anchors = [max(range(len(unit_NC)), key=lambda i: unit_NC[i] @ mean_C)]
    while len(anchors) < count:
        nearest = [max(unit @ unit_NC[anchor] for anchor in anchors) for unit in unit_NC]
        farthest = min(range(len(unit_NC)), key=lambda i: nearest[i])
        if nearest[farthest] > 1 - 1e-5:
            break
        anchors.append(farthest)
    return np.array([max(range(len(anchors)), key=lambda k: unit @ unit_NC[anchors[k]]) for unit in unit_NC])


def literal_weights(feature_NC: np.ndarray, count: int, temperature: float | None, power: float) -> np.ndarray:
    """SRW's weights within each region at a temperature; without one, the weights by the regions' sizes."""
    region_N, weight_N = literal_regions(feature_NC, count), np.zeros(len(feature_NC))
    unit_NC = feature_NC.astype(np.float64) / np.linalg.norm(feature_NC.astype(np.float64), axis=1, keepdims=True)
    for region in set(region_N):
        members = np.flatnonzero(region_N == region)
        if temperature is None:
            weight_N[members] = len(members) ** -power
            continue
        similarity = [np.mean([unit_NC[i] @ unit_NC[j] for j in members]) for i in members]
        raw = np.exp(-np.array(similarity) / temperature)
        weight_N[members] = len(members) * raw / raw.sum()
    return weight_N if temperature is not None else weight_N / weight_N.mean()


@pytest.mark.parametrize("count", [2, 5, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_weights_are_the_literal_formulas(count, seed):
    embedding = teacher(seed)
    regional = RegionalSRW(0.3, regions=count)(ZEROS, seen(embedding))
    balanced = RegionBalance(0.7, regions=count)(ZEROS, seen(embedding))
    for image in range(B):
        feature_NC = embedding[image].flatten(1).T[VALID[image]].numpy()
        for weight, settings in ((regional, (0.3, 0.0)), (balanced, (None, 0.7))):
            expected = literal_weights(feature_NC, count, *settings)
            np.testing.assert_allclose(weight[image][VALID[image]], expected, rtol=2e-5)
            assert (weight[image][~VALID[image]] == 0).all()
    assert regional[0].std() > 0.05 and balanced[0].std() > 0.05


def test_every_region_has_mean_one_whatever_its_size():
    embedding = teacher()
    member_BRN = divide(units(embedding), VALID, 4)
    assert torch.equal(member_BRN.sum(1), VALID.long())
    weight_BN = RegionalSRW(0.1, regions=4)(ZEROS, seen(embedding))
    size_BR, total_BR = member_BRN.sum(2), (member_BRN * weight_BN[:, None]).sum(2)
    torch.testing.assert_close(total_BR, size_BR.float())
    assert weight_BN.max() > 2 and len(size_BR[0].unique()) > 1


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_a_regions_total_goes_as_its_size_to_one_minus_the_power(power):
    embedding = teacher()
    member_BRN = divide(units(embedding), VALID, 4)
    weight_BN = RegionBalance(power, regions=4)(ZEROS, seen(embedding))
    size_R, total_R = member_BRN[0].sum(1).float(), (member_BRN[0] * weight_BN[0]).sum(1)
    torch.testing.assert_close(total_R / total_R[0], (size_R / size_R[0]) ** (1 - power))
    torch.testing.assert_close(weight_BN.sum(1) / VALID.sum(1), torch.ones(B))


def test_objects_that_differ_are_regions_and_a_small_one_weighs_more():
    direction_KC = torch.eye(C)[:3]
    number_N = torch.tensor([0] * 24 + [1] * 9 + [2] * 3)
    noise = 0.05 * torch.randn(1, C, N, generator=torch.Generator().manual_seed(2))
    embedding = (direction_KC[number_N].T[None] + noise).unflatten(2, (SIDE, SIDE))
    valid = torch.ones(1, N, dtype=torch.bool)
    member_RN = divide(F.normalize(embedding.flatten(2), dim=1), valid, 3)[0]
    assert {tuple(row.nonzero().flatten().tolist()) for row in member_RN} == {
        tuple((number_N == number).nonzero().flatten().tolist()) for number in range(3)
    }
    weight_N = RegionBalance(1.0, regions=3)(ZEROS[:1], seen(embedding, valid))[0]
    torch.testing.assert_close(weight_N, torch.tensor([N / 3 / 24, N / 3 / 9, N / 3 / 3])[number_N])


def test_an_image_of_fewer_different_patches_has_fewer_regions():
    pattern = torch.randn(B, 128, 2, generator=torch.Generator().manual_seed(3))
    length = torch.rand(B, 1, N, generator=torch.Generator().manual_seed(4)) + 0.01  # equal but for rounding
    embedding = (pattern[:, :, torch.arange(N) % 3 // 2] * length).unflatten(2, (SIDE, SIDE))
    member_BRN = divide(units(embedding), VALID, 8)
    assert [sorted(sizes[sizes > 0].tolist()) for sizes in member_BRN.sum(2)] == [
        [12, 24],
        [10, 20],
        [5, 12],
        [2, 4],
        [1],
    ]
    torch.testing.assert_close(RegionalSRW(0.3)(ZEROS, seen(embedding)), VALID.float(), rtol=0, atol=1e-5)


def test_regions_do_not_depend_on_the_other_images_of_the_batch():
    embedding, weigh = teacher(), RegionalSRW(0.3)
    together = weigh(ZEROS, seen(embedding))
    for image in range(B):
        rows = slice(image, image + 1)
        torch.testing.assert_close(weigh(ZEROS[rows], seen(embedding[rows], VALID[rows])), together[rows])


def test_another_output_of_the_teacher_can_divide_and_weigh():
    outputs = {"t.embedding": teacher(), "t.tokens": teacher(9)}
    view = Seen(outputs, VALID, "embedding")
    for weighting in (RegionalSRW, RegionBalance):
        expected = weighting()(ZEROS, seen(outputs["t.tokens"]))
        assert torch.equal(weighting(feature="tokens")(ZEROS, view), expected)
        assert not torch.equal(weighting()(ZEROS, view), expected)
    with pytest.raises(UserError, match="weighting.feature=small: has 9 patches, but the distance of .* has 36"):
        RegionBalance(feature="small")(ZEROS, Seen({**outputs, "t.small": teacher()[:, :, :3, :3]}, VALID, "embedding"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "regional_srw", "regions": 1}, "weighting.regions=1: expected at least 2 regions; one region is"),
        ({"name": "region_balance", "regions": 0}, "weighting.regions=0: expected at least 2 regions"),
        ({"name": "regional_srw", "temperature": 0}, "weighting.temperature=0.0: expected a number above 0"),
        ({"name": "region_balance", "power": 1.5}, "weighting.power=1.5: expected a number from 0 to 1"),
        ({"name": "region_balance", "power": -0.5}, "weighting.power=-0.5: expected a number from 0 to 1"),
        ({"name": "srw", "temperature": 0}, "weighting.temperature=0.0: expected a number above 0"),
    ],
)
def test_values_out_of_range_are_refused_with_their_place_before_any_data(settings, says):
    with pytest.raises(UserError, match=rf"^objective\.a\.{says}"):
        objective.check({"a": {"distance": {"name": "mse"}, "weighting": settings}})


@pytest.mark.parametrize("name", ["regional_srw", "region_balance"])
def test_vectors_have_no_regions(name):
    settings = {"a": {"distance": {"name": "mse"}, "weighting": {"name": name}}}
    says = f"weighting.name={name}: output=embedding is compared by one value per image, which has no regions; use"
    with pytest.raises(UserError, match=rf"^objective\.a\.{says}"):
        objective.check_vectors(settings)
    with pytest.raises(UserError, match=rf"^objective\.a\.{says}"):
        Objective(settings, {"student.embedding": (8,), "t.embedding": (8,)})
    Objective(settings, {"student.embedding": (8, 4, 4), "t.embedding": (8, 4, 4)})
    with pytest.raises(UserError, match="weighting: output=embedding is compared by one value per image"):
        RegionBalance()(torch.zeros(B), Seen({"t.embedding": torch.zeros(B, C)}, None, "embedding"))
