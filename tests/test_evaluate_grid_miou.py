"""The grid metric equals a plain loop over segment_anything's SamPredictor, in every mode."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from fmdistill.backbones.promptable import PromptHead
from fmdistill.evaluate import intervals, results, tails
from fmdistill.evaluate.grid_miou import Case, GridMiou, compare, grid_points, image_iou, run
from fmdistill.evaluate.intervals import entry_key
from fmdistill.evaluate.masks import iou, pack, to_rle
from fmdistill.evaluate.results import value
from fmdistill.registry import UserError

GRID, SIZE, CHANNELS = 8, 128, 32
SHAPES = {"3:2": ((60, 90), (85, 128)), "2:3": ((96, 64), (128, 85)), "square": ((70, 70), (128, 128))}
MODES = ["single", "best_predicted", "paired", "oracle"]


def tiny_sam() -> Sam:
    """Return a Sam with random weights, scaled up so that masks follow the point and the predicted IoUs differ."""
    torch.manual_seed(8)
    decoder = MaskDecoder(
        num_multimask_outputs=3,
        transformer=TwoWayTransformer(depth=2, embedding_dim=CHANNELS, mlp_dim=64, num_heads=4),
        transformer_dim=CHANNELS,
        iou_head_depth=3,
        iou_head_hidden_dim=32,
    )
    prompts = PromptEncoder(CHANNELS, (GRID, GRID), (SIZE, SIZE), mask_in_chans=16)
    encoder = ImageEncoderViT(img_size=SIZE, patch_size=16, embed_dim=16, depth=1, num_heads=2, out_chans=CHANNELS)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return Sam(encoder, prompts, decoder).eval()


def embeddings(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a teacher's embedding and a student's similar one."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(CHANNELS, GRID, GRID, generator=generator)
    return teacher, teacher + 0.5 * torch.randn(CHANNELS, GRID, GRID, generator=generator)


def predict(predictor: SamPredictor, embedding, original, resized, point, mode: str, resolution: str):
    predictor.features, predictor.is_image_set = embedding[None], True
    predictor.original_size, predictor.input_size = original, resized
    multimask = mode != "single"
    masks, predicted, low = predictor.predict(point[None], np.array([1]), multimask_output=multimask)
    if resolution == "low":
        cells = 4 * GRID / SIZE
        masks = low[:, : int(np.ceil(resized[0] * cells)), : int(np.ceil(resized[1] * cells))] > 0
    return masks, predicted


def loop(sam: Sam, teacher, student, original, resized, k: int, mode: str, resolution: str) -> tuple[list, list]:
    """Compute the metric with SamPredictor; return the IoU per point, and the areas of the teacher's masks."""
    predictor, scores, areas = SamPredictor(sam), [], []
    for row in range(k):
        for column in range(k):
            point = np.array([(column + 0.5) / k * original[1], (row + 0.5) / k * original[0]])
            t, t_iou = predict(predictor, teacher, original, resized, point, mode, resolution)
            s, s_iou = predict(predictor, student, original, resized, point, mode, resolution)
            best, student_best = t[t_iou.argmax()], s[s_iou.argmax()]
            if mode == "paired":
                pairs = list(zip(t, s, strict=True))
            else:
                pairs = [(best, mask) for mask in s] if mode == "oracle" else [(best, student_best)]
            ious = [np.logical_and(a, b).sum() / np.logical_or(a, b).sum() if (a | b).any() else 1.0 for a, b in pairs]
            scores.append(max(ious) if mode == "oracle" else np.mean(ious))
            areas += [mask.mean() for mask in t]
    return scores, areas


@pytest.mark.parametrize("shape", ["3:2", *(pytest.param(s, marks=pytest.mark.slow) for s in ("2:3", "square"))])
@pytest.mark.parametrize("resolution", ["original", "low"])
@pytest.mark.parametrize("mode", MODES)
def test_equals_a_loop_over_the_predictor(mode, resolution, shape):
    sam, (teacher, student), (original, resized) = tiny_sam(), embeddings(), SHAPES[shape]
    expected, areas = loop(sam, teacher, student, original, resized, 6, mode, resolution)
    assert 0.02 < np.mean(areas) < 0.98 and np.ptp(areas) > 0.02, "the masks are degenerate"
    assert 0.05 < np.mean(expected) < 0.95 and np.ptp(expected) > 0.02, "the scores are degenerate"
    head = PromptHead.from_sam(sam)
    for batch in (1, 5):
        protocol = GridMiou(select=mode, resolution=resolution, points_per_batch=batch)
        iou_P = image_iou(head, teacher, student, original, resized, 6, protocol)
        assert iou_P.mean() == pytest.approx(np.mean(expected), abs=1e-4)
        # One cell whose logit is a rounding error away from 0 is a large share of a small mask.
        np.testing.assert_allclose(iou_P, expected, atol=5e-3)


@pytest.mark.parametrize("resolution", ["original", "low"])
@pytest.mark.parametrize("mode", MODES)
def test_teacher_against_itself_is_exactly_one(mode, resolution):
    head, (teacher, student), (original, resized) = PromptHead.from_sam(tiny_sam()), embeddings(), SHAPES["3:2"]
    protocol = GridMiou(select=mode, resolution=resolution, points_per_batch=16)
    scores, _ = compare(head, teacher, {"self": teacher.clone(), "student": student}, original, resized, 5, protocol)
    assert (scores["self"] == 1.0).all() and (scores["student"] < 1.0).any()


@pytest.mark.parametrize("resolution", ["original", "low"])
@pytest.mark.parametrize("mode", ["single", "best_predicted", "oracle"])
def test_buckets_are_of_the_teacher_s_own_mask_at_the_protocol_s_resolution(mode, resolution):
    sam, (teacher, student), (original, resized) = tiny_sam(), embeddings(), SHAPES["2:3"]
    protocol = GridMiou(select=mode, resolution=resolution, points_per_batch=7, by_size=True, by_edge=True)
    scores, buckets = compare(PromptHead.from_sam(sam), teacher, {"s": student}, original, resized, 6, protocol)
    predictor, cells = SamPredictor(sam), 4 * GRID / SIZE
    for i, (x, y) in enumerate(grid_points(6, original)):
        masks, predicted = predict(predictor, teacher, original, resized, np.array([x, y]), mode, resolution)
        mask = masks[predicted.argmax()]
        if resolution == "low":
            x, y = x / original[1] * resized[1] * cells, y / original[0] * resized[0] * cells
        mask_1HW = torch.from_numpy(mask[None])
        expected = tails.split(tails.area(mask_1HW), tails.AREAS)
        expected |= tails.split(tails.edge_distance(mask_1HW, torch.tensor([[int(x), int(y)]])), tails.EDGES)
        assert {name: bool(members[i]) for name, members in buckets.items()} == {
            k: bool(v[0]) for k, v in expected.items()
        }
    assert np.sum(list(buckets.values()), axis=0).tolist() == [2] * 36
    off = replace(protocol, by_size=False, by_edge=False)
    plain, none = compare(PromptHead.from_sam(sam), teacher, {"s": student}, original, resized, 6, off)
    assert none == {} and (plain["s"] == scores["s"]).all()


def test_points_are_cell_centres_in_floats():
    points = grid_points(5, (64, 96))
    np.testing.assert_allclose(points[0], [96 * 0.1, 64 * 0.1])
    np.testing.assert_allclose(points[1], [96 * 0.3, 64 * 0.1])
    np.testing.assert_allclose(points[-1], [96 * 0.9, 64 * 0.9])


@pytest.mark.parametrize("pixels", [(3, 5), (8, 8), (13, 21)])
def test_packed_iou_equals_booleans_and_empty_against_empty_is_one(pixels):
    a, b = torch.rand(2, 6, *pixels).gt(0.6)
    a[0] = b[0] = a[1] = False
    b[1] = True
    both, either = (a & b).flatten(1).sum(1), (a | b).flatten(1).sum(1)
    expected = torch.where(either > 0, both / either.clamp(min=1), 1.0)
    np.testing.assert_allclose(iou(pack(a), pack(b)), expected.numpy(), atol=1e-7)
    assert iou(pack(a), pack(b))[:2].tolist() == [1.0, 0.0]
    # Masks on a GPU stay tensors.
    np.testing.assert_array_equal(iou(a.flatten(1), b.flatten(1)), iou(pack(a), pack(b)))


class Planted(torch.nn.Module):
    """A head whose real region is all mask, and whose padding is mask only for a positive embedding."""

    config = {"image_size": SIZE, "image_embedding_size": GRID}

    def __init__(self, rows: int):
        super().__init__()
        self.scale, self.rows = torch.nn.Parameter(torch.ones(())), rows

    def decode(self, embedding, points, labels, boxes=None, multimask=True):
        """Return logits of +1 in real rows and of the embedding's sign in padded rows."""
        logits = torch.ones(len(points), 3, 4 * GRID, 4 * GRID)
        logits[:, :, self.rows :] = embedding.sign().mean()
        return logits, torch.ones(len(points), 3)


def test_padding_never_enters_at_low_resolution():
    rows = 22  # ceil(85 * 32 / 128)
    ones = torch.ones(CHANNELS, GRID, GRID)
    protocol = GridMiou(resolution="low")
    assert (image_iou(Planted(rows), ones, -ones, *SHAPES["3:2"], 3, protocol) == 1.0).all()
    assert (image_iou(Planted(rows - 1), ones, -ones, *SHAPES["3:2"], 3, protocol) < 1.0).all(), "a real row was cut"


def test_feature_figures_ignore_padded_tokens():
    head, (teacher, _) = PromptHead.from_sam(tiny_sam()), embeddings()
    student = teacher.clone()
    student[:, 6:] = 99.0  # 85 rows of pixels are ceil(85 / 16) = 6 rows of tokens
    cases = [Case("a", "photos", teacher, {"student": student}, *SHAPES["3:2"])]
    rows, _ = run(GridMiou(grids=(2,), device="cpu"), head, cases)
    assert value(rows, "cosine") == pytest.approx(1.0) and value(rows, "mse") == 0.0


def test_run_averages_points_images_and_groups():
    head, cases = PromptHead.from_sam(tiny_sam()), []
    for seed, (group, shape) in enumerate([("photos", "3:2"), ("photos", "square"), ("scenes", "2:3")]):
        teacher, student = embeddings(seed)
        cases.append(Case(str(seed), group, teacher, {"student": student, "self": teacher}, *SHAPES[shape]))
    rows, details = run(GridMiou(grids=(2, 3), device="cpu"), head, cases)
    images = {(image["key"], image["subject"]): image for image in details["images"]}
    means = [images[str(i), "student"]["miou"]["3x3"] for i in range(3)]
    assert value(rows, "miou", grid="3x3") == pytest.approx(np.mean(means))
    assert value(rows, "miou_per_image", grid="3x3") == pytest.approx(np.mean(means))
    assert value(rows, "miou", grid="3x3", group="photos") == pytest.approx(np.mean(means[:2]))
    assert value(rows, "miou", grid="3x3", group="scenes") == pytest.approx(means[2])
    assert value(rows, "miou", "self", grid="2x2") == 1.0 and all(isinstance(row["value"], float) for row in rows)
    counts = {(row["metric"], row.get("grid"), row.get("group")): row["count"] for row in rows}
    assert (
        counts["miou", "3x3", None] == 27 and counts["miou", "2x2", "photos"] == 8 and counts["cosine", None, None] == 3
    )
    assert run(GridMiou(grids=(2,), images=1, device="cpu"), head, cases)[1]["images"][0]["key"] == "0"


def test_means_have_the_intervals_of_the_images_sums_and_the_values_of_all_points():
    head, cases, points = PromptHead.from_sam(tiny_sam()), [], {None: [], "photos": [], "scenes": []}
    for seed, (group, shape) in enumerate([("photos", "3:2"), ("photos", "square"), ("scenes", "2:3")]):
        teacher, student = embeddings(seed)
        cases.append(Case("same", group, teacher, {"student": student}, *SHAPES[shape], shard=str(seed)))
        iou_P = image_iou(head, teacher, student, *SHAPES[shape], 4, GridMiou(device="cpu"))
        points[None].append(iou_P)
        points[group].append(iou_P)
    rows, details = run(GridMiou(grids=(4,), by_size=True, device="cpu"), head, cases)
    for group, parts in points.items():
        dimensions = {"grid": "4x4"} if group is None else {"grid": "4x4", "group": group}
        (row,) = (r for r in rows if results.key(r) == results.key({"metric": "miou", **dimensions}))
        assert row["value"] == np.concatenate(parts).mean()  # to the last digit
        (entry,) = (e for e in details["per_image"] if entry_key(e) == results.key(row))
        assert entry["sums"] == [part.sum() for part in parts] and entry["counts"] == [16] * len(parts)
        assert ("low" in row) == (len(parts) > 1)
    assert details["per_image"][0]["images"] == ["0/same", "1/same", "2/same"]
    both = intervals.of_entries([e for e in details["per_image"] if e["metric"] == "mse"])
    assert [(r["low"], r["high"]) for r in rows if r["metric"] == "mse"] == both
    buckets = {r["bucket"] for r in rows if "bucket" in r}
    assert buckets == {e["bucket"] for e in details["per_image"] if "bucket" in e} and buckets


@pytest.mark.parametrize(("mode", "counts"), [("best_predicted", (1, 1)), ("paired", (3, 3)), ("oracle", (1, 3))])
def test_written_masks_survive_json_and_give_the_scores(mode, counts):
    head, (teacher, student) = PromptHead.from_sam(tiny_sam()), embeddings()
    case = Case("a", "photos", teacher, {"student": student}, *SHAPES["3:2"])
    rows, details = run(GridMiou(grids=(2,), select=mode, write_masks=True, device="cpu"), head, [case])
    scores = []
    for entry in json.loads(json.dumps(details["masks"])):
        t, s = ([coco.decode(rle).astype(bool) for rle in entry[side]] for side in ("teacher", "student"))
        assert (len(t), len(s)) == counts and t[0].shape == case.original
        pairs = zip(t * (len(s) // len(t)), s, strict=True)
        ious = [(a & b).sum() / (a | b).sum() if (a | b).any() else 1.0 for a, b in pairs]
        scores.append(max(ious) if mode == "oracle" else np.mean(ious))
    assert value(rows, "miou", grid="2x2") == pytest.approx(np.mean(scores))


def test_rle_round_trip():
    mask = np.random.default_rng(0).random((13, 7)) > 0.5
    assert (coco.decode(json.loads(json.dumps(to_rle(mask)))) == mask).all()


def test_settings_that_measure_nothing_are_errors():
    for settings in ({"grids": ()}, {"grids": (0,)}, {"points_per_batch": 0}, {"images": 0}):
        with pytest.raises(UserError):
            GridMiou(**settings)
    with pytest.raises(UserError, match="no images"):
        run(GridMiou(device="cpu"), PromptHead.from_sam(tiny_sam()), [])
