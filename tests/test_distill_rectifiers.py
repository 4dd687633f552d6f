"""Every rectifier compared with its formula in float64; other outputs remain unchanged."""

import numpy as np
import pytest
import torch
from ramps import FEATURES, LABEL, LOGITS

from fmdistill.distill.objective import SHAPES, Objective
from fmdistill.distill.rectifiers import RECTIFIERS, Priors
from fmdistill.distill.rectifiers.krd_representation import simplex
from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError, bind, complete

# Legend: B images, D channels, K classes.

B, K, D = 8, 10, 16
COUNTS = torch.tensor([512, 256, 128, 64, 32, 16, 8, 4, 2, 1])
MEANS = torch.randn(K, D, generator=torch.Generator().manual_seed(0)) + 1.0
OUTPUT = {"krd_representation": "feature", "krd_logits": "logits", "probability_swap": "logits"}
OUTPUT["probability_mix"] = "logits"


def rectifier(name: str, counts: torch.Tensor = COUNTS, teacher: tuple[int, ...] = (D,), **settings):
    context = {"student": teacher, "teacher": teacher, "shapes": {}, "priors": Priors(counts, lambda output: MEANS)}
    return complete(bind({"name": name, **settings}, RECTIFIERS, "rectify", tuple(context)), context, "rectify")


def seen(output: str, label: torch.Tensor | None = LABEL) -> Seen:
    (student_logits, logits), (student_feature, feature) = LOGITS, FEATURES
    outputs = {
        "student.logits": student_logits.clone().requires_grad_(),
        "student.feature": student_feature.clone().requires_grad_(),
        "t.logits": logits.clone().requires_grad_(),
        "t.feature": feature.clone().requires_grad_(),
    }
    whole = {"t.logits": logits, "t.feature": feature}
    return Seen(outputs, None, output, whole, label, tuple("abcdefgh"), 1.5)


def rectified(name: str, before: Seen, **settings) -> torch.Tensor:
    return rectifier(name, **settings)(before).teacher(before.output)


def softmax(logits: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    raw = np.exp(logits.detach().double().numpy() / temperature)
    return raw / raw.sum(1, keepdims=True)


@pytest.mark.parametrize("name", sorted(RECTIFIERS))
def test_only_the_compared_output_of_the_teacher_changes_and_it_has_no_gradient(name):
    before = seen(OUTPUT[name])
    after = rectifier(name)(before)
    changed = {key for key, value in after.outputs.items() if value is not before.outputs[key]}
    assert changed == {f"t.{before.output}"} and after.whole.keys() == before.whole.keys() - changed
    new, old = after.teacher(before.output), before.teacher(before.output)
    assert new.shape == old.shape and new.dtype == torch.float32 and not new.requires_grad
    assert (new - old).abs().max() > 0.1
    assert (after.output, after.label, after.keys, after.epoch) == (before.output, LABEL, before.keys, 1.5)


@pytest.mark.parametrize("name", sorted(RECTIFIERS))
def test_an_objective_compares_with_the_rectified_output(name):
    output = OUTPUT[name]
    term = {"output": output, "distance": {"name": "mse"}, "weighting": {"name": "uniform"}, "rectify": {"name": name}}
    width = (K,) if output == "logits" else (D,)
    shapes = {f"student.{output}": width, f"t.{output}": width}
    objective, view = Objective({"a": term}, shapes, Priors(COUNTS, lambda name: MEANS)), seen(output)
    assert not list(objective.parameters())
    losses, _ = objective(view)
    losses["a"].backward()
    torch.testing.assert_close(losses["a"].detach(), (view.student() - rectified(name, view)).square().mean().detach())
    assert view.outputs[f"student.{output}"].grad.abs().sum() > 0 and view.outputs[f"t.{output}"].grad is None


@pytest.mark.parametrize("classes, dimensions", [(2, 2), (10, 16), (16, 16), (100, 128)])
def test_anchors_are_unit_vectors_with_one_cosine_as_low_as_can_be(classes, dimensions):
    anchors_KD = simplex(classes, dimensions)
    assert anchors_KD.shape == (classes, dimensions) and torch.equal(anchors_KD, simplex(classes, dimensions))
    expected = torch.full((classes, classes), -1 / (classes - 1)).fill_diagonal_(1.0)
    torch.testing.assert_close(anchors_KD @ anchors_KD.T, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gamma, power", [(0.5, 1.0), (1.0, 0.5), (0.0, 1.0)])
def test_anchors_pull_the_features_of_rare_classes(gamma, power):
    view = seen("feature")
    rectified_BD = rectified("krd_representation", view, gamma=gamma, power=power)
    anchors, counts = simplex(K, D).double().numpy(), COUNTS.numpy()
    for i, feature in enumerate(view.teacher("feature").detach().double().numpy()):
        pull = gamma * (1 - counts[LABEL[i]] / counts.max()) ** power
        mixed = (1 - pull) * feature / np.linalg.norm(feature) + pull * anchors[LABEL[i]]
        np.testing.assert_allclose(rectified_BD[i], mixed / np.linalg.norm(mixed), atol=1e-6)
    if gamma == 1:  # nothing is left of the feature where a class is as rare as can be, nor moved of the commonest
        assert rectified_BD[0] @ torch.nn.functional.normalize(view.teacher("feature")[0], dim=0) > 1 - 1e-5


def test_anchors_belong_to_the_checkpoint_and_means_do_not():
    assert set(rectifier("krd_representation").state_dict()) == {"anchors_KD", "pull_K"}
    by_means = rectifier("krd_representation", anchors="means")
    by_means(seen("feature"))
    assert by_means.state_dict() == {}


def test_means_move_the_mean_of_all_images_to_that_of_balanced_classes():
    requested = []

    def means(output: str) -> torch.Tensor:
        requested.append(output)
        return MEANS

    settings = {"name": "krd_representation", "anchors": "means"}
    context = {"teacher": (D,), "priors": Priors(COUNTS, means)}
    rectifier = complete(bind(settings, RECTIFIERS, "rectify", tuple(context)), context, "rectify")
    view = seen("feature", label=None)
    for _ in range(2):
        after = rectifier(view).teacher("feature")
    assert requested == ["feature"]
    share, mean = COUNTS.double().numpy() / COUNTS.sum().item(), MEANS.double().numpy()
    expected = view.teacher("feature").detach().double().numpy() - (share[:, None] * mean).sum(0) + mean.mean(0)
    np.testing.assert_allclose(after, expected, atol=1e-6)


@pytest.mark.parametrize("kappa", [0.5, 1.0])
def test_logits_lose_the_logarithm_of_their_classes_shares(kappa):
    view = seen("logits", label=None)
    expected = view.teacher("logits").detach().numpy() - kappa * np.log(COUNTS.numpy() / COUNTS.sum().item())
    np.testing.assert_allclose(rectified("krd_logits", view, kappa=kappa), expected, rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"beta": 0.999}])
def test_balanced_classes_leave_logits_equal_up_to_a_constant(settings):
    view = seen("logits")
    change = rectified("krd_logits", view, counts=torch.full((K,), 50), **settings) - view.teacher("logits").detach()
    torch.testing.assert_close(change, change[:, :1].expand_as(change))


@pytest.mark.parametrize("beta", [0.9, 0.9999])
def test_inverse_effective_numbers_multiply_the_softened_probabilities(beta):
    view = seen("logits")
    weight = (1 - beta) / (1 - beta ** COUNTS.double().numpy())
    product = softmax(view.teacher("logits"), 2.0) * weight * K / weight.sum()
    probabilities = softmax(rectified("krd_logits", view, kappa=2.0, beta=beta), 2.0)
    np.testing.assert_allclose(probabilities, product / product.sum(1, keepdims=True), rtol=1e-5)


def partly_wrong() -> tuple[Seen, torch.Tensor]:
    """Return logits whose largest is the label's for the first three images only, and where it is not, (B,)."""
    best_B, wrong_B = LOGITS[1].argmax(1), torch.arange(B) >= 3
    return seen("logits", label=torch.where(wrong_B, (best_B + 1) % K, best_B)), wrong_B


def test_swapping_rights_wrong_answers_and_leaves_right_ones_alone():
    view, wrong_B = partly_wrong()
    before, after = view.teacher("logits").detach(), rectified("probability_swap", view)
    assert torch.equal(after[~wrong_B], before[~wrong_B]) and torch.equal(after.argmax(1), view.label)
    for logits, rectified_logits, label in zip(before[wrong_B], after[wrong_B], view.label[wrong_B], strict=True):
        best, expected = logits.argmax(), logits.clone()
        expected[best], expected[label] = logits[label], logits[best]
        assert torch.equal(rectified_logits, expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 1.0])
def test_mixing_puts_the_label_ahead_by_the_threshold(threshold, temperature):
    (view, wrong_B), rows = partly_wrong(), np.arange(B)
    logits = rectified("probability_mix", view, threshold=threshold, temperature=temperature)
    assert torch.isfinite(logits).all()
    p, mixed = softmax(view.teacher("logits"), temperature), softmax(logits, temperature)
    wrong_B, label = wrong_B.numpy(), view.label.numpy()
    others = np.where(np.arange(K) == label[:, None], -1, mixed).max(1)
    np.testing.assert_allclose((mixed[rows, label] - others)[wrong_B], threshold, atol=1e-6)
    raised = np.minimum(1, p[rows, label] + threshold)
    np.testing.assert_allclose(mixed[rows, label][~wrong_B], raised[~wrong_B], atol=1e-6)
    rest = np.arange(K) != label[:, None]  # what the label gains, the others lose in proportion
    factor = (1 - mixed[rows, label]) / (1 - p[rows, label])
    np.testing.assert_allclose(mixed[rest], (p * factor[:, None])[rest], atol=1e-6)


@pytest.mark.parametrize("factor", [0.0, 1e4, 1e30])
@pytest.mark.parametrize("name", sorted(RECTIFIERS))
def test_hostile_outputs_stay_finite(name, factor):
    label = partly_wrong()[0].label
    outputs = {key: value.detach() * factor for key, value in seen(OUTPUT[name]).outputs.items()}
    for settings in [{"threshold": 0.0}, {"threshold": 1.0}] if name == "probability_mix" else [{}]:
        rectified_logits = rectified(name, Seen(outputs, None, OUTPUT[name], label=label), **settings)
        assert torch.isfinite(rectified_logits).all()


@pytest.mark.parametrize(
    "name, settings, says",
    [
        (
            "krd_representation",
            {"teacher": (9,)},
            "anchors=etf: 9 dimensions hold the anchors of 2 to 9 classes, not of 10",
        ),
        ("krd_representation", {"teacher": (D, 4, 4)}, r"the teacher's output is a map \(16, 4, 4\)"),
        (
            "krd_representation",
            {"gamma": 1.5},
            "rectify.gamma=1.5, rectify.power=1.0: expected a gamma from 0 to 1 and a power",
        ),
        ("krd_representation", {"anchors": "mean"}, "anchors='mean': unknown. Did you mean 'means'"),
        ("krd_logits", {"kappa": 0.0}, "rectify.kappa=0.0: expected a number above 0"),
        ("krd_logits", {"beta": 1.0}, "rectify.beta=1.0: expected a number between 0 and 1"),
        ("krd_logits", {"counts": torch.tensor([3, 1, 0])}, "rectify: class 2 has no training image"),
        ("probability_mix", {"threshold": 1.2}, "rectify.threshold=1.2: expected a probability"),
        ("probability_mix", {"temperature": 0.0}, "rectify.temperature=0.0: expected a number above 0"),
    ],
)
def test_settings_that_make_no_sense_raise(name, settings, says):
    with pytest.raises(UserError, match=says):
        rectifier(name, **settings)


@pytest.mark.parametrize("name", ["krd_representation", "probability_mix", "probability_swap"])
def test_rectifying_by_labels_needs_labels(name):
    with pytest.raises(UserError, match=f"rectify.name={name}: learns from labels, but these images have none"):
        rectifier(name)(seen(OUTPUT[name], label=None))


@pytest.mark.parametrize("name", ["krd_logits", "probability_mix", "probability_swap"])
def test_maps_have_no_classes_to_rectify(name):
    view = Seen({"t.logits": torch.zeros(2, K, 3, 3)}, None, "logits", label=torch.zeros(2, dtype=torch.long))
    with pytest.raises(UserError, match=f"rectify.name={name}: .* the channels of a map"):
        rectifier(name)(view)


def test_logits_of_other_classes_and_unknown_priors_raise():
    with pytest.raises(UserError, match="output=logits has 10 values and the images 3 classes"):
        rectifier("krd_logits", counts=torch.tensor([3, 2, 1]))(seen("logits"))
    term = {"output": "logits", "distance": {"name": "mse"}, "weighting": {"name": "uniform"}}
    with pytest.raises(UserError, match="objective.a.rectify: KRDLogits needs `priors`"):
        Objective({"a": {**term, "rectify": {"name": "krd_logits"}}})
    with pytest.raises(UserError, match="rectify.priors: no such setting"):
        bind({"name": "krd_logits", "priors": 1}, RECTIFIERS, "rectify", (*SHAPES, "priors"))
