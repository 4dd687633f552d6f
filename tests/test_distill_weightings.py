"""Every weighting against a literal formula in float64; all have mean one, no gradient, and zero for padding."""

import json

import numpy as np
import pytest
import torch
from ramps import FEATURES, LABEL, LOGITS

from fmdistill.distill.objective import SHAPES, Objective
from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings import WEIGHTINGS, Learned
from fmdistill.distill.weightings.ipwd import IPWD
from fmdistill.registry import UserError, bind, complete

# Legend: B images, N patches, C channels, M entries of a group.

B, N, K, D = 6, 20, 5, 7
KEYS = tuple(f"image/{i}" for i in range(B))
LISTED = {key: 0.5 + i for i, key in enumerate(KEYS)}
SETTINGS = {
    "uniform": {},
    "srw": {"temperature": 0.3},
    "sum_normalizer": {},
    "soft_exp": {"temperature": 0.7},
    "soft_poly": {"alpha": 2.0},
    "hard_mining": {"temperature": 0.7},
    "hard_discarding": {"fraction": 0.3},
    "wsld": {"normalize": True},
    "ipwd": {"normalize": True, "direction": "kd_over_cls"},
    "by_key": {"weights": "weights.json"},
    "regional_srw": {"temperature": 0.3, "regions": 3},
    "region_balance": {"power": 0.7, "regions": 3},
}
BY_DISTANCE = ["hard_discarding", "hard_mining", "soft_exp", "soft_poly"]
BY_SIMILARITY = ["srw", "sum_normalizer"]
OF_MASKS = {"hard_mask", "mask_area"}  # in tests/test_distill_refine.py, since they need masks
OF_PATCHES = ["uniform", *BY_SIMILARITY, *BY_DISTANCE]  # whose groups may be images
BY_REGION = ["regional_srw", "region_balance"]  # of patches only; their formulas are in test_distill_regions.py


@pytest.fixture(autouse=True)
def listed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.json").write_text(json.dumps(LISTED))


def weighting(name: str, **settings):
    torch.manual_seed(0)
    context = {"student": (K,), "teacher": (K,), "shapes": {"student.logits": (K,), "student.feature": (D,)}}
    return complete(bind({"name": name, **settings}, WEIGHTINGS, "weighting", SHAPES), context, "weighting")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def maps(ragged: bool = True) -> tuple[torch.Tensor, Seen]:
    """Return a distance (B, N) of maps, some of whose patches are padding that differs by image, and its batch."""
    student, teacher = numbers(B, D, 4, 5).requires_grad_(), numbers(B, D, 4, 5, seed=1) + 0.5
    valid = torch.ones(B, N, dtype=torch.bool)
    if ragged:
        for image in range(B):
            valid[image, N - 3 * image :] = False
    outputs, grids = {"student.embedding": student, "t.embedding": teacher}, {"t.embedding": valid}
    seen = Seen(outputs, valid, "embedding", keys=KEYS, grids=grids)
    return numbers(B, N, seed=2).square(), seen


def vectors() -> tuple[torch.Tensor, Seen]:
    """Return a distance (B,) of logits, and its batch with features, labels and keys."""
    outputs = {
        "student.logits": 2 * numbers(B, K, seed=3).requires_grad_(),
        "student.feature": numbers(B, D, seed=4).requires_grad_(),
        "t.logits": 3 * numbers(B, K, seed=5),
    }
    whole = {"t.logits": outputs["t.logits"]}
    label = torch.arange(B) % K
    return numbers(B, seed=6).square(), Seen(outputs, None, "logits", whole, label, KEYS, epoch=2.5)


def pairwise(feature_CM: np.ndarray, valid_M: np.ndarray) -> np.ndarray:
    """Return each entry's mean cosine to the valid entries, pair by pair, in float64."""
    unit_MC = [column / np.linalg.norm(column) for column in feature_CM.astype(np.float64).T]
    return np.array([np.mean([a @ b for b, ok in zip(unit_MC, valid_M, strict=True) if ok]) for a in unit_MC])


def literal(name: str, similarity: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Return the formulas' weights for one group without padding, with the settings above; their sum is one."""
    s, d = similarity.astype(np.float64), distance.astype(np.float64)
    if name == "hard_discarding":
        raw = np.ones(len(d))
        raw[np.argsort(d)[len(d) - round(0.3 * len(d)) :]] = 0
    else:
        raw = {
            "uniform": np.ones(len(d)),
            "srw": np.exp(-s / 0.3),
            "sum_normalizer": -s - (-s).min(),
            "soft_exp": np.exp(-d / 0.7),
            "soft_poly": (1 + d) ** -2.0,
            "hard_mining": np.exp(d / 0.7),
        }[name]
    return raw / raw.sum()


def groups(seen: Seen, distance: torch.Tensor, group: str):
    """Yield (rows, columns) of each group's valid entries."""
    rows, columns = seen.valid.numpy().nonzero()
    yield from [(rows, columns)] if group == "batch" else [(rows[rows == b], columns[rows == b]) for b in range(B)]


def test_every_weighting_is_tested_here():
    assert SETTINGS.keys() == WEIGHTINGS.keys() - OF_MASKS


@pytest.mark.parametrize("group", ["image", "batch"])
@pytest.mark.parametrize("name", OF_PATCHES)
def test_weights_of_patches_are_the_literal_formula(name, group):
    distance, seen = maps()
    weight = weighting(name, **SETTINGS[name], **({} if name == "uniform" else {"group": group}))(distance, seen)
    feature = seen.teacher("embedding").flatten(2).numpy()
    for rows, columns in groups(seen, distance, group):
        feature_CM = feature[rows, :, columns].T
        expected = literal(name, pairwise(feature_CM, np.ones(len(rows), bool)), distance.numpy()[rows, columns])
        np.testing.assert_allclose(weight.numpy()[rows, columns], expected * len(rows), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", OF_PATCHES)
def test_weights_of_samples_are_the_literal_formula(name):
    distance, seen = vectors()
    similarity = pairwise(seen.teacher("logits").numpy().T, np.ones(B, bool))
    expected = literal(name, similarity, distance.numpy()) * B
    np.testing.assert_allclose(weighting(name, **SETTINGS[name])(distance, seen), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("padding", ["include", "exclude"])
@pytest.mark.parametrize("name", [*OF_PATCHES, *BY_REGION, "by_key"])
def test_every_weighting_of_maps_has_mean_one_no_gradient_and_is_zero_on_padding(name, padding):
    distance, seen = maps(ragged=False)
    seen.valid[:, 12:] = False
    view = seen.focus("embedding", padding)
    weight = weighting(name, **SETTINGS[name])(distance, view)
    assert weight.shape == distance.shape and weight.dtype == torch.float32 and not weight.requires_grad
    assert (weight >= 0).all() and (weight[~view.valid] == 0).all()
    assert (weight[:, 12:].sum() > 0) == (padding == "include")
    mean_B = weight.sum(1) / view.valid.sum(1)
    torch.testing.assert_close(mean_B.mean() if name == "by_key" else mean_B, torch.ones(() if name == "by_key" else B))


@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - BY_REGION))
def test_every_weighting_of_samples_has_mean_one_and_no_gradient(name):
    distance, seen = vectors()
    weight = weighting(name, **SETTINGS[name])(distance, seen)
    assert weight.shape == (B,) and weight.dtype == torch.float32 and not weight.requires_grad and (weight >= 0).all()
    torch.testing.assert_close(weight.mean(), torch.ones(()))
    assert name == "uniform" or weight.max() > 1.01


@pytest.mark.parametrize("name", [*OF_PATCHES, *BY_REGION, "by_key"])
def test_weights_do_not_depend_on_padded_patches(name):
    distance, seen = maps()
    weigh = weighting(name, **SETTINGS[name])
    before, padded = weigh(distance, seen), ~seen.valid
    seen.teacher("embedding").flatten(2).transpose(1, 2)[padded] = 1e4 * numbers(int(padded.sum()), D, seed=8)
    after = weigh(torch.where(padded, torch.tensor(1e6), distance), seen)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("name", [*OF_PATCHES, "wsld", "by_key"])
def test_weights_follow_the_samples_in_any_order(name):
    distance, seen = vectors()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = {key: value[order] for key, value in seen.outputs.items()}
    keys = [KEYS[i] for i in order]
    view = Seen(moved, None, "logits", {"t.logits": moved["t.logits"]}, seen.labels("test")[order], keys, 2.5)
    weigh = weighting(name, **SETTINGS[name])
    torch.testing.assert_close(weigh(distance[order], view), weigh(distance, seen)[order])


def reference() -> tuple[torch.Tensor, Seen]:
    """Return the distance between the reference features, one value per sample, and its batch."""
    student, teacher = FEATURES
    seen = Seen({"student.feature": student, "t.feature": teacher}, output="feature", whole={"t.feature": teacher})
    return (student - teacher).square().mean(1), seen


@pytest.mark.parametrize(
    "reverse, expected",
    [
        (False, [0.113821, 0.110755, 0.121471, 0.131122, 0.128522, 0.136571, 0.125189, 0.132549]),
        (True, [0.136617, 0.140400, 0.128014, 0.118592, 0.120991, 0.113860, 0.124212, 0.117315]),
    ],
)
@pytest.mark.parametrize("group", ["batch", "global_batch"])
def test_srw_and_its_reverse_equal_the_reference_values(reverse, expected, group):
    distance, seen = reference()
    weight = weighting("srw", temperature=0.5, reverse=reverse, group=group)(distance, seen)
    np.testing.assert_allclose(weight / 8, expected, atol=1e-6)


@pytest.mark.parametrize(
    "name, settings, expected",
    [
        ("soft_exp", {"temperature": 0.5}, 0.43716779351234436),
        ("soft_exp", {"temperature": 1.0}, 0.48630374670028687),
        ("soft_exp", {"temperature": 2.0}, 0.5222797989845276),
        ("soft_poly", {"alpha": 1.0}, 0.5159754753112793),
        ("soft_poly", {"alpha": 2.0}, 0.4753091335296631),
        ("soft_poly", {"alpha": 5.0}, 0.4013599157333374),
    ],
)
def test_weights_by_distance_equal_the_reference_values(name, settings, expected):
    distance, seen = reference()
    gaps = [0.490866, 0.548340, 0.317043, 0.476696, 0.759581, 0.362669, 0.259889, 1.335523]
    np.testing.assert_allclose(distance, gaps, atol=1e-6)
    weight = weighting(name, **settings)(distance, seen)
    np.testing.assert_allclose((weight * distance).mean().item(), expected, rtol=2e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("group", ["image", "batch", "global_batch"])
def test_a_relative_temperature_is_so_many_deviations_of_the_groups_similarities(group, reverse):
    distance, seen = vectors() if group == "global_batch" else maps()
    weights = weighting("srw", temperature=1.5, group=group, reverse=reverse, relative=True)(distance, seen)
    if group == "global_batch":
        similarity = pairwise(seen.teacher("logits").numpy().T, np.ones(B, bool))
        absolute = weighting("srw", temperature=1.5 * similarity.std(), group=group, reverse=reverse)(distance, seen)
        torch.testing.assert_close(weights, absolute, rtol=1e-4, atol=1e-5)
        return
    feature = seen.teacher("embedding").flatten(2).numpy()
    for rows, columns in groups(seen, distance, group):
        similarity = pairwise(feature[rows, :, columns].T, np.ones(len(rows), bool))
        absolute = weighting("srw", temperature=1.5 * similarity.std(), group=group, reverse=reverse)(distance, seen)
        torch.testing.assert_close(weights[rows, columns], absolute[rows, columns], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, settings", [("srw", {"reverse": True}), ("srw", {"relative": True}), ("sum_normalizer", {})]
)
def test_a_slice_of_the_global_batch_is_weighed_as_the_whole_is(name, settings):
    weigh, (distance, seen) = weighting(name, **settings), vectors()
    together = weigh(distance, seen)
    for rows in (slice(0, 2), slice(2, B)):
        part = Seen({key: value[rows] for key, value in seen.outputs.items()}, None, "logits", seen.whole)
        torch.testing.assert_close(weigh(distance[rows], part), together[rows])


def hostile() -> dict[str, tuple[torch.Tensor, Seen]]:
    distance, seen = maps()
    few = torch.arange(N) < torch.tensor([N, 0, 1, 2, N, N])[:, None]
    alike = torch.ones(B, D, 4, 5)
    logits = vectors()[1]

    def mapped(teacher: torch.Tensor, valid: torch.Tensor) -> Seen:
        return Seen({**seen.outputs, "t.embedding": teacher}, valid, "embedding", keys=KEYS)

    def sampled(factor: float, rows: slice = slice(0, B)) -> Seen:
        outputs = {key: value[rows] * factor for key, value in logits.outputs.items()}
        return Seen(outputs, None, "logits", {"t.logits": outputs["t.logits"]}, LABEL[rows] % K, KEYS[rows])

    return {
        "no valid patch in an image": (distance, mapped(seen.teacher("embedding"), few)),
        "equal maps": (torch.full((B, N), 0.3), mapped(alike, seen.valid)),
        "equal maps of zeros": (torch.zeros(B, N), mapped(0 * alike, seen.valid)),
        "huge distances": (torch.linspace(-1e30, 1e30, N).expand(B, N), seen),
        "largest distances": (torch.linspace(0, 3.4e38, N).expand(B, N), seen),
        "huge and equal": (torch.full((B, N), 1e30), seen),
        "equal samples": (torch.full((B,), 0.3), sampled(0.0)),
        "huge samples": (torch.linspace(0, 1e30, B), sampled(1e15)),
        "hugest samples": (torch.linspace(0, 1e38, B), sampled(1e37)),
        "a single sample": (torch.ones(1), sampled(1.0, slice(0, 1))),
    }


@pytest.mark.parametrize(
    "name, case",
    [
        (name, case)
        for name in SETTINGS
        for case, (distance, _) in hostile().items()
        if name not in (BY_REGION if distance.dim() == 1 else ("wsld", "ipwd"))
    ],
)
def test_hostile_values_get_finite_weights(name, case):
    distance, seen = hostile()[case]
    small = {"temperature": 1e-10} if "temperature" in SETTINGS[name] and name != "srw" else {}
    for settings in (SETTINGS[name], {**SETTINGS[name], **small}):
        weight = weighting(name, **settings)(distance, seen)
        assert torch.isfinite(weight).all() and (weight >= 0).all()
        if distance.dim() == 2:
            assert (weight[~seen.valid] == 0).all()
        if name in OF_PATCHES + BY_REGION:  # an image without valid patches has no mean
            mean = weight.sum(1) / seen.valid.sum(1) if distance.dim() == 2 else weight.mean()
            torch.testing.assert_close(mean.nan_to_num(1), torch.ones_like(mean), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", BY_SIMILARITY)
@pytest.mark.parametrize("kind", ["maps", "samples"])
def test_weights_of_similarities_that_differ_by_rounding_are_one(name, kind, reverse):
    length = numbers(B, 1, 4, 5, seed=9).abs() + 0.1
    teacher = numbers(1, 16, 1, 1) * length if kind == "maps" else numbers(1, 16) * length[:, :, 0, 0]
    valid = torch.arange(N).expand(B, N) < 15
    if kind == "maps":
        teacher[:, :, 3] = numbers(B, 16, 5)  # the padding
    seen = Seen({"t.embedding": teacher}, valid, "embedding", {"t.embedding": teacher})
    settings = {"relative": True, "temperature": 0.5, "reverse": reverse} if name == "srw" else {}
    weight = weighting(name, **settings)(torch.zeros(B, N) if kind == "maps" else torch.zeros(B), seen)
    expected = valid.float() if kind == "maps" else torch.ones(B)
    torch.testing.assert_close(weight, expected, rtol=0, atol=0.05 if name == "srw" else 0)


def test_hard_discarding_drops_the_largest_but_never_all_nor_one_of_equals():
    distance, seen = torch.tensor([5.0, 1.0, 3.0, 3.0, 2.0]), Seen({"t.x": torch.zeros(5, 2)}, output="x")
    weights = {
        fraction: weighting("hard_discarding", fraction=fraction)(distance, seen) for fraction in (0, 0.2, 0.4, 0.99)
    }
    assert weights[0].tolist() == [1] * 5 and weights[0.2].tolist() == weights[0.4].tolist() == [
        0,
        1.25,
        1.25,
        1.25,
        1.25,
    ]
    assert weights[0.99].tolist() == [0, 5, 0, 0, 0]


def test_soft_poly_treats_a_distance_below_zero_as_zero():
    seen = Seen({"t.x": torch.zeros(2, 2)}, output="x")
    assert weighting("soft_poly")(torch.tensor([-3.0, 0.0]), seen).tolist() == [1, 1]


def cross_entropy(logits: np.ndarray, label: np.ndarray) -> np.ndarray:
    z = logits.astype(np.float64)
    return np.array([np.log(np.exp(row).sum()) - row[y] for row, y in zip(z, label, strict=True)])


def test_wsld_is_the_literal_formula_and_its_mean_is_not_one():
    student, teacher = LOGITS
    seen = Seen({"student.logits": student, "t.logits": teacher}, None, "logits", label=LABEL)
    weight = weighting("wsld")(torch.zeros(8), seen)
    student_B, teacher_B = (cross_entropy(z.numpy(), LABEL.numpy()) for z in LOGITS)
    expected = 1 - np.exp(-student_B / (teacher_B + 1e-7))
    np.testing.assert_allclose(weight, expected, rtol=1e-5)
    assert weight.mean() < 0.95 and weight.max() < 1
    normalized = weighting("wsld", normalize=True)(torch.zeros(8), seen)
    np.testing.assert_allclose(normalized, expected / expected.mean(), rtol=1e-5)


@pytest.mark.parametrize("direction", ["cls_over_kd", "kd_over_cls"])
@pytest.mark.parametrize("largest", [1.5, 10.0])
def test_ipwd_is_the_literal_formula(direction, largest):
    distance, seen = vectors()
    ipwd = weighting("ipwd", direction=direction, largest=largest)
    label = seen.label.numpy()
    second = seen.student("feature").detach().numpy() @ ipwd.head.weight.detach().numpy().T
    second = second + ipwd.head.bias.detach().numpy()
    standard = [
        (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)
        for z in (seen.student("logits").detach().numpy().astype(np.float64), second.astype(np.float64))
    ]
    kd, cls = (cross_entropy(z, label) for z in standard)
    ratio = cls / kd if direction == "cls_over_kd" else kd / cls
    np.testing.assert_allclose(ipwd(distance, seen), np.clip(1 + ratio, 1, largest), rtol=1e-4)
    np.testing.assert_allclose(ipwd.auxiliary(seen).detach(), cross_entropy(second, label), rtol=1e-5)
    assert ((1 + ratio) > 1.5).any()


def test_ipwd_weighs_one_before_its_first_epoch_and_so_it_does_outside_of_training():
    distance, seen = vectors()
    weights = {start: weighting("ipwd", start_epoch=start)(distance, seen) for start in (0.0, 2.5, 2.6)}
    assert (weights[2.6] == 1).all() and (weights[2.5] > 1).all() and torch.equal(weights[0.0], weights[2.5])
    outside = Seen(seen.outputs, None, "logits", label=seen.label)
    assert torch.equal(weighting("ipwd", start_epoch=9.0)(distance, outside), weights[0.0])


def with_ipwd(scale: float = 1.0) -> tuple[Objective, Seen]:
    torch.manual_seed(0)
    shapes = {"student.logits": (K,), "student.feature": (D,), "t.logits": (K,)}
    term = {"output": "logits", "distance": {"name": "kd"}, "weighting": {"name": "ipwd"}, "scale": scale}
    student = {name: numbers(B, width, seed=3).requires_grad_() for name, width in (("logits", K), ("feature", D))}
    outputs = {"student.logits": student["logits"], "student.feature": student["feature"], "t.logits": numbers(B, K)}
    return Objective({"kd": term}, shapes), Seen(outputs, label=torch.arange(B) % K)


def test_ipwds_second_head_learns_from_labels_alone_and_moves_no_student():
    objective, seen = with_ipwd()
    assert isinstance(objective.terms["kd"].weighting, Learned) and isinstance(objective.terms["kd"].weighting, IPWD)
    names = {"terms.kd.weighting.head.weight", "terms.kd.weighting.head.bias"}
    assert {name for name, _ in objective.named_parameters()} == names == set(objective.state_dict())
    distance, weight, view = objective.terms["kd"].measure(seen.focus("logits", "include"))
    (weight * distance).mean().backward()
    assert all(parameter.grad is None for parameter in objective.parameters())
    logits_alone = seen.outputs["student.logits"].grad.clone()
    auxiliary = objective.terms["kd"].weighting.auxiliary(view)
    auxiliary.mean().backward()
    assert auxiliary.shape == (B,) and all(parameter.grad.abs().sum() > 0 for parameter in objective.parameters())
    assert seen.outputs["student.feature"].grad is None
    assert torch.equal(seen.outputs["student.logits"].grad, logits_alone)


def test_ipwds_own_loss_is_added_without_the_terms_scale():
    objective, seen = with_ipwd(scale=0.0)
    losses, _ = objective(seen)
    view = seen.focus("logits", "include")
    torch.testing.assert_close(losses["kd"], objective.terms["kd"].weighting.auxiliary(view).mean())


def test_listed_weights_have_mean_one_over_the_batch_or_are_the_files_own():
    distance, seen = vectors()
    own = torch.tensor(list(LISTED.values()))
    torch.testing.assert_close(weighting("by_key", weights="weights.json")(distance, seen), own / own.mean())
    fixed = weighting("by_key", weights="weights.json", normalize=False)
    assert torch.equal(fixed(distance, seen), own)
    distance, seen = maps()
    assert torch.equal(fixed(distance, seen), own[:, None] * seen.valid)


def test_images_that_the_file_weighs_zero_stay_out(tmp_path):
    (tmp_path / "weights.json").write_text(json.dumps(dict.fromkeys(KEYS, 0)))
    assert (weighting("by_key", weights="weights.json")(*vectors()) == 0).all()


@pytest.mark.parametrize(
    "content, says",
    [
        ({key: 1.0 for key in KEYS[1:]}, r"weights.json: has no weight for image 'image/0', nor for 0 others"),
        ([1.0, 2.0], "weights.json: contains a list; expected {key: weight}"),
        ({"a": "much"}, "weights.json: image 'a' has weight 'much'; expected a number of at least 0"),
        ({"a": -1}, "weights.json: image 'a' has weight -1; expected a number of at least 0"),
        ({"a": float("nan")}, "weights.json: image 'a' has weight nan"),
        (None, "weights.json: not a readable JSON file"),
    ],
)
def test_a_wrong_file_of_weights_raises_what_it_lacks(tmp_path, content, says):
    (tmp_path / "weights.json").write_text("{" if content is None else json.dumps(content))
    with pytest.raises(UserError, match=says):
        weighting("by_key", weights="weights.json")(*vectors())


def test_a_file_of_weights_has_its_encoding_named_and_may_have_a_byte_order_mark(tmp_path):
    distance, seen = vectors()
    content = json.dumps(
        {key: place + 1.0 for place, key in enumerate(seen.keys)} | {"caf\xe9": 1.0}, ensure_ascii=False
    )
    own = torch.arange(1.0, len(seen.keys) + 1)
    path = tmp_path / "weights.json"
    path.write_bytes(content.encode("utf-8-sig"))
    torch.testing.assert_close(weighting("by_key", weights=str(path))(distance, seen), own / own.mean())
    for encoding, says in (("latin-1", "Latin-1"), ("utf-16", "UTF-16")):
        path.write_bytes(content.encode(encoding))
        with pytest.raises(UserError, match=f"^weighting.weights={path}: not UTF-8 .*{says}") as error:
            weighting("by_key", weights=str(path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", BY_DISTANCE)
def test_weights_by_distance_know_no_global_batch_and_nothing_within_a_vector(name):
    with pytest.raises(
        UserError, match="group=global_batch: these weights depend on the student, whose .* use image or"
    ):
        weighting(name, group="global_batch")
    with pytest.raises(UserError, match="nothing to weigh within an image; use batch"):
        weighting(name, group="image")(*vectors())


@pytest.mark.parametrize(
    "name, settings, says",
    [
        ("srw", {"temperature": 0.0}, "weighting.temperature=0.0: expected a number above 0"),
        ("soft_exp", {"temperature": -1.0}, "weighting.temperature=-1.0: expected a number above 0"),
        ("hard_mining", {"temperature": 0.0}, "weighting.temperature=0.0: expected a number above 0"),
        ("soft_poly", {"alpha": 0.0}, "weighting.alpha=0.0: expected a number above 0"),
        ("hard_discarding", {"fraction": 1.0}, "weighting.fraction=1.0: expected a fraction of at least 0"),
        ("ipwd", {"largest": 0.5}, "weighting.largest=0.5: expected a weight of at least 1"),
        ("ipwd", {"start_epoch": -1.0}, "weighting.start_epoch=-1.0: expected a number of epochs"),
        (
            "ipwd",
            {"feature": "features"},
            "feature=features: the student has no such output, .* Did you mean 'feature'",
        ),
        ("by_key", {"weights": "none.json"}, "none.json: not a readable JSON file"),
    ],
)
def test_settings_that_make_no_sense_raise(name, settings, says):
    with pytest.raises(UserError, match=says):
        weighting(name, **settings)


@pytest.mark.parametrize("name", ["wsld", "ipwd"])
def test_weights_by_labels_need_labels_and_whole_images(name):
    distance, seen = vectors()
    with pytest.raises(UserError, match=f"weighting.name={name}: learns from labels, but these images have none"):
        weighting(name)(distance, Seen(seen.outputs, None, "logits"))
    with pytest.raises(UserError, match=f"weighting.name={name}: weighs whole images, but .* one value per patch"):
        weighting(name)(*maps())


def test_ipwd_needs_vectors_of_a_known_student():
    partial = bind({"name": "ipwd"}, WEIGHTINGS, "weighting", SHAPES)
    with pytest.raises(
        UserError, match=r"feature=feature: the student's output is a map \(8, 2, 2\); ipwd needs one vector"
    ):
        partial(shapes={"student.feature": (8, 2, 2), "student.logits": (K,)})
    with pytest.raises(UserError, match="weighting.shapes: no such setting"):
        bind({"name": "ipwd", "shapes": {}}, WEIGHTINGS, "weighting", SHAPES)
    settings = {"distance": {"name": "mse"}, "weighting": {"name": "ipwd"}}
    with pytest.raises(UserError, match="objective.a.weighting: IPWD needs `shapes`"):
        Objective({"a": settings})


@pytest.mark.parametrize("name", BY_SIMILARITY)
def test_similarities_that_do_not_fit_the_distance_raise(name):
    distance, seen = maps()
    with pytest.raises(
        UserError, match="feature=embedding: has 20 patches, but the distance of output=embedding has 5; weigh"
    ):
        weighting(name)(distance[:, :5], seen)
    distance, seen = vectors()
    rectified = Seen(seen.outputs, None, "logits", {})
    with pytest.raises(UserError, match="group=global_batch: logits is rectified for the images of this batch only"):
        weighting(name)(distance, rectified)
    assert torch.isfinite(weighting(name, group="batch")(distance, rectified)).all()
