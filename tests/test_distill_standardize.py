"""Standardised targets: their statistics, the last layers into which they fold, and the loss in their units."""

import numpy as np
import pytest
import tiny
import torch
from nondegenerate import randomize
from ramps import drawn
from timm.layers.norm import LayerNorm2d
from torch import nn

from fmdistill import cache
from fmdistill.backbones.timm_clip import TimmCLIP
from fmdistill.backbones.timm_sam import TimmSAM
from fmdistill.backbones.tinyvit import TinyViTSAM
from fmdistill.cache import moments
from fmdistill.cache.dataset import CachedImages
from fmdistill.distill.objective import Objective
from fmdistill.distill.seen import Seen
from fmdistill.distill.standardize import Standardizer, TeacherScale, fold, last_layer, phi_s, statistics
from fmdistill.registry import UserError

KINDS = ("channel", "phi_s")
PADDINGS = ("include", "exclude")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A cache of int8 with images that are padded below, for its 24 training images in three shards."""
    folder = tmp_path_factory.mktemp("standardize")
    recipe = tiny.load(folder, "cache.codec=int8")
    cache.run(recipe)
    return cache.open_cache(recipe)


def tokens(opened: cache.Cache, padding: str, exact: bool) -> np.ndarray:
    """Every training token (T, C), one by one, as decoded or as the teacher makes it."""
    data, model, collected = CachedImages(opened, "train"), tiny.teacher(), []
    for shard, count in enumerate(data.counts):
        for index in range(count):
            item = tiny.item(data, shard, index)
            made = model(item["pixels"][None], item["sizes"][None])["embedding"][0]
            map_CN = (made if exact else item["outputs"]["sam.embedding"]).flatten(1).double().numpy()
            valid_N = opened.preprocess.valid(item["sizes"][None]).flatten().numpy()
            collected += [map_CN[:, n] for n in range(map_CN.shape[1]) if valid_N[n] or padding == "include"]
    return np.array(collected)


@pytest.mark.parametrize("padding", PADDINGS)
def test_channel_statistics_are_those_of_the_teachers_own_tokens(opened, padding):
    token_TC = tokens(opened, padding, exact=True)
    made = moments.channel_moments(opened, "embedding", padding)
    assert made.count == len(token_TC) and (padding == "include") == (made.count == 24 * 16)
    np.testing.assert_allclose(made.mean_C, token_TC.mean(0), atol=1e-6)
    np.testing.assert_allclose(made.deviation_C, token_TC.std(0), rtol=1e-5)
    prefixed = statistics(opened, "sam.embedding", padding, "channel")
    np.testing.assert_allclose(prefixed.scale_C, token_TC.std(0), rtol=1e-5)
    z_TC = prefixed(torch.from_numpy(token_TC)).numpy()
    np.testing.assert_allclose(z_TC.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(z_TC.std(0), 1, rtol=1e-5)


@pytest.mark.parametrize("padding", PADDINGS)
def test_the_covariance_is_that_of_the_decoded_tokens_and_phi_s_levels_it(opened, padding):
    token_TC = tokens(opened, padding, exact=False)
    values = moments.covariance(opened, "embedding", padding)
    assert values.count == len(token_TC)
    np.testing.assert_allclose(values.mean_C, token_TC.mean(0), atol=1e-12)
    np.testing.assert_allclose(values.covariance_CC, np.cov(token_TC.T, bias=True), atol=1e-12)
    z_TC = statistics(opened, "embedding", padding, "phi_s")(torch.from_numpy(token_TC)).numpy()
    np.testing.assert_allclose(z_TC.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(z_TC.std(0), 1, rtol=1e-5)


def test_the_covariance_is_computed_once_and_again_for_other_shards_or_a_damaged_file(opened, monkeypatch):
    first = moments.covariance(opened, "embedding", "include")
    (path,) = opened.root.glob("covariance-embedding-include-*.safetensors")
    calls = []
    compute = moments._computed
    monkeypatch.setattr(moments, "_computed", lambda *a: calls.append(a) or compute(*a))
    again = moments.covariance(opened, "embedding", "include")
    assert not calls and again.count == first.count
    assert np.array_equal(again.mean_C, first.mean_C) and np.array_equal(again.covariance_CC, first.covariance_CC)
    path.write_bytes(path.read_bytes()[:-9])
    moments.covariance(opened, "embedding", "include")
    assert len(calls) == 1 and moments.read(path, moments._description(opened, "embedding", "include")) is not None
    few = cache.Cache(opened.store, opened.images)
    few.shards = {**opened.shards, "train": opened.shards["train"][:2]}
    assert moments.covariance(few, "embedding", "include").count == 16 * 16 and len(calls) == 2
    assert len(list(opened.root.glob("covariance-embedding-include-*.safetensors"))) == 2
    assert moments.covariance(opened, "embedding", "include").count == first.count and len(calls) == 2


def test_statistics_that_do_not_exist_raise(opened):
    with pytest.raises(UserError, match="output=embeding: .* has no such output. Did you mean 'embedding'"):
        statistics(opened, "embeding", "include", "channel")
    broken = cache.Cache(opened.store, opened.images)
    shard = broken.shards["train"][0]
    shard.statistics = {"embedding": {"valid": {"count": 3}}}
    with pytest.raises(UserError, match="train-000.tar: its sidecar has no statistics of embedding"):
        statistics(broken, "embedding", "exclude", "channel")
    broken.shards = {"train": []}
    for kind in KINDS:
        with pytest.raises(UserError, match="embedding has 0 tokens in the training images"):
            statistics(broken, "embedding", "include", kind)


def drawn_standardizer(kind: str, channels: int) -> Standardizer:
    generator = np.random.default_rng(channels)
    mean_C = 3 * generator.normal(size=channels)
    if kind == "channel":
        return Standardizer(mean_C, np.exp(generator.normal(size=channels)))
    scale, turn_CC = phi_s(
        np.cov(generator.normal(size=(channels, 3 * channels)) * np.arange(1, channels + 1)[:, None])
    )
    return Standardizer(mean_C, np.full(channels, scale), turn_CC)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [12, 30, 32])
def test_a_standardizer_inverts_and_is_its_formula_token_by_token(kind, channels):
    standardizer = drawn_standardizer(kind, channels)
    for shape in ((4, channels), (2, channels, 3, 2)):
        (output,) = drawn(shape)
        z = standardizer.double()(output)
        torch.testing.assert_close(standardizer.inverse(z), output, rtol=0, atol=1e-6)
        mean, scale = standardizer.mean_C.numpy(), standardizer.scale_C.numpy()
        turn = np.eye(channels) if standardizer.rotation_CC is None else standardizer.rotation_CC.numpy()
        x_TC, z_TC = (v.flatten(2).transpose(1, 2).flatten(0, 1) if v.dim() > 2 else v for v in (output, z))
        for x, value in zip(x_TC.numpy(), z_TC.numpy(), strict=True):
            np.testing.assert_allclose(value, turn @ ((x - mean) / scale), atol=1e-12)


C = 12
LAYERS = {  # with what of the inverse each holds: mean, rotation
    "norm of a map": (LayerNorm2d(C, eps=1e-6), (2, C, 3, 3), True, False),
    "norm": (nn.LayerNorm(C), (5, C), True, False),
    "batch norm": (nn.BatchNorm2d(C), (2, C, 3, 3), True, False),
    "convolution": (nn.Conv2d(4, C, 3, padding=1), (2, 4, 3, 3), True, True),
    "convolution without bias": (nn.Conv2d(4, C, 1, bias=False), (2, 4, 3, 3), False, True),
    "grouped convolution": (nn.Conv2d(4, C, 3, groups=4), (2, 4, 3, 3), True, False),
    "linear": (nn.Linear(4, C), (5, 4), True, True),
    "linear without bias": (nn.Linear(4, C, bias=False), (5, 4), False, True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_folded_layer_gives_what_the_map_made_of_its_output_and_unfolds(name, kind):
    layer, shape, shifts, rotates = LAYERS[name]
    randomize(layer)
    standardizer, (feature,) = drawn_standardizer(kind, C), drawn(shape)
    feature = feature.float()
    scale = TeacherScale(layer, standardizer)
    assert (scale.shifts, scale.rotates) == (shifts, rotates and kind == "phi_s")
    before, raw = {k: v.clone() for k, v in layer.state_dict().items()}, layer(feature)
    expected = scale(raw)
    if shifts and (rotates or kind == "channel"):  # the whole inverse: the raw output is the standardised one
        torch.testing.assert_close(expected, standardizer.inverse(raw), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(standardizer(expected), raw, rtol=1e-5, atol=1e-5)
    scale.fold()
    torch.testing.assert_close(layer(feature), expected, rtol=1e-5, atol=1e-5)
    scale.unfold()
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "build",
    [
        lambda: TinyViTSAM(
            image_size=64, out_channels=C, embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)
        ),
        lambda: TimmSAM("resnet18", image_size=64, out_channels=C),
        lambda: TimmCLIP("resnet18", embed_dim=C, image_size=64),
    ],
    ids=["TinyViTSAM", "TimmSAM", "TimmCLIP"],
)
def test_a_folded_student_of_each_class_gives_what_the_unfolded_one_learned(build, kind):
    student, (image,) = randomize(build()), drawn((2, 3, 64, 64))
    standardizer = drawn_standardizer(kind, C)
    raw = student(image.float())["embedding"]
    expected = TeacherScale(last_layer(student, "embedding"), standardizer)(raw)
    names = list(student.state_dict())
    fold(student, "sam.embedding", standardizer)
    folded = student(image.float())["embedding"]
    assert list(student.state_dict()) == names  # so that it exports under the same names
    torch.testing.assert_close(folded, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))


def test_layers_that_hold_no_scale_and_students_that_state_none_raise():
    standardizer = drawn_standardizer("channel", C)
    for layer in (nn.GELU(), nn.LayerNorm(C, elementwise_affine=False), nn.LayerNorm(C, bias=False), nn.Linear(C, 4)):
        with pytest.raises(UserError, match="student: a standardised target of 12 channels folds into .*last layer is"):
            TeacherScale(layer, standardizer)
    with pytest.raises(UserError, match="Linear does not state the last layer of embedding"):
        last_layer(nn.Linear(3, 3), "embedding")


def compared(standardizer: Standardizer | None, distance: dict, pair: tuple[torch.Tensor, torch.Tensor], **more):
    term = {"distance": distance, "weighting": {"name": "uniform"}, **more}
    shapes = {"student.embedding": tuple(pair[0].shape[1:]), "sam.embedding": tuple(pair[1].shape[1:])}
    standardizers = {} if standardizer is None else {"a": standardizer.double()}
    grids = {"sam.embedding": torch.ones(len(pair[0]), 6, dtype=torch.bool)}
    objective = Objective({"a": term}, shapes, standardizers=standardizers)
    return objective(Seen({"student.embedding": pair[0], "sam.embedding": pair[1]}, grids=grids))[0]["a"]


def test_the_loss_is_that_of_the_standardised_outputs_and_weights_are_of_the_teachers_own():
    pair = drawn((2, C, 2, 3), (2, C, 2, 3))
    s, t = (x.numpy() for x in pair)
    standardizer = drawn_standardizer("channel", C)
    deviation = standardizer.scale_C.double().numpy()[:, None, None]
    loss = compared(standardizer, {"name": "mse"}, pair, standardize="channel")
    np.testing.assert_allclose(loss, (((s - t) / deviation) ** 2).mean(), rtol=1e-10)
    turned = drawn_standardizer("phi_s", C)
    loss = compared(turned, {"name": "mse"}, pair, standardize="phi_s")  # a rotation changes no squared length
    plain = compared(None, {"name": "mse"}, pair)
    np.testing.assert_allclose(loss, plain / float(turned.scale_C[0].double()) ** 2, rtol=1e-6)
    centred = [x - standardizer.mean_C.double().view(-1, 1, 1) for x in pair]
    units = [x / torch.from_numpy(deviation) for x in centred]
    loss = compared(standardizer, {"name": "cosine"}, pair, standardize="channel")
    np.testing.assert_allclose(loss, compared(None, {"name": "cosine"}, tuple(units)), rtol=1e-10)
    # SRW's weights are of the teacher's own map, as cache.similarity stores them.
    weighed = {"weighting": {"name": "srw", "temperature": 0.5}}
    term = {"distance": {"name": "mse"}, "standardize": "channel", **weighed}
    shapes = {"student.embedding": (C, 2, 3), "sam.embedding": (C, 2, 3)}
    seen = Seen({"student.embedding": pair[0], "sam.embedding": pair[1]}, grids={"sam.embedding": torch.ones(2, 6) > 0})
    made = Objective({"a": term}, shapes, standardizers={"a": standardizer})
    own = Objective({"a": {"distance": {"name": "mse"}, **weighed}}, shapes)
    assert torch.equal(made.terms["a"].measure(seen)[1], own.terms["a"].measure(seen)[1])
