"""Train a small SAM on images with known objects, by random prompts and a dense auxiliary loss: task `promptable`."""

# Legend: B images, P prompts an image, N = B P, M masks, n low-resolution side, S image side, L drawn pixels.

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmdistill.backbones.sam import SamPreprocess
from fmdistill.distill import student as students
from fmdistill.distill.job import Job
from fmdistill.images import build as build_images
from fmdistill.images.source import SPLITS
from fmdistill.mini.labelled import LabelledImages
from fmdistill.mini.sam import MiniSam
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError

FOCAL_NORMS = ("parts", "object", "image")


def promptable(
    recipe: Recipe,
    prompts: int = 6,
    background: float = 0.1,
    focal: float = 1.0,
    focal_norm: str = "parts",
    iou: float = 1.0,
    dense: float = 1.0,
    small: float = 0.25,
    contour: float = 0.0,
) -> Job:
    """Train a promptable segmenter from images with exact masks: `prompts` an image, a share of them for `background`.

    An object is prompted in proportion to area^-small. `focal`, `iou`, `dense` and `contour` weigh the losses of
    `Promptable`; `focal_norm` says what divides the focal loss: "parts" (which a fresh network needs), "object" or
    "image", see `mask_losses`.
    """
    if prompts < 1:
        raise UserError(f"task.prompts={prompts}: expected at least 1")
    if not 0 <= background < 1:
        raise UserError(f"task.background={background}: expected a share of the prompts, from 0 to below 1")
    if not 0 <= small <= 1:
        raise UserError(f"task.small={small}: expected a power of the area, from 0 to 1")
    student = students.build(recipe.student)
    if not isinstance(student, MiniSam):
        raise UserError(f"student.name={recipe.student['name']}: task promptable trains sam_mini, which makes masks")
    images, preprocess = build_images(recipe.images), SamPreprocess(image_size=student.image_size)
    train, validation = (
        LabelledImages(images, split, preprocess, prompts, recipe.seed, background, small, memory=memory)
        for split, memory in zip(SPLITS, (recipe.train.image_memory, 0.0), strict=True)
    )
    if contour < 0:
        raise UserError(f"task.contour={contour}: expected a weight of at least 0")
    task = Promptable(student, focal=focal, focal_norm=focal_norm, iou=iou, dense=dense, contour=contour)
    return Job(task, student, train, validation)


class Promptable(nn.Module):
    """The losses of a promptable segmenter: of its masks, of its IoU predictions, and of its embedding.

    Focal and dice losses are of the best of three masks and of the single mask, as SAM has them (Kirillov et al. 2023,
    appendix A), but with `mask_losses`' focal loss at weight 1, and `longer_contours` at weight `contour`; `SameObject`
    judges the embedding. A share `refined` of the prompts is decoded a second time, with a corrective point and the
    first mask as mask prompt. `forward` takes pixels uint8 (B, 3, S, S), sizes (B, 2), labels (B, S, S) with -1 for
    padding, points (B, P, 2) xy, target (B, P) object id, boxes (B, P, 4) xyxy, use_box bool (B, P).
    """

    def __init__(
        self,
        student: MiniSam,
        focal: float = 1.0,
        dice: float = 1.0,
        iou: float = 1.0,
        dense: float = 1.0,
        spread: float = 0.05,
        refined: float = 0.25,
        focal_norm: str = "parts",
        contour: float = 0.0,
    ):
        super().__init__()
        if focal_norm not in FOCAL_NORMS:
            raise UserError(f"task.focal_norm={focal_norm}: use one of {', '.join(FOCAL_NORMS)}")
        self.student, self.focal_norm = student, focal_norm
        self.focal, self.dice, self.iou, self.dense_weight = focal, dice, iou, dense
        self.spread, self.refined, self.contour = spread, refined, contour
        self.dense = SameObject(student.out_channels)

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """Return "loss", its parts, and the errors 1 - IoU of the best of three and of the IoU head's pick."""
        head, prompts = self.student.head, batch["target"].shape[1]
        embedding_BCgg = self.student.embed(batch["pixels"], batch["sizes"])
        side = embedding_BCgg.shape[-1] * 4
        target_Nnn, valid_Nnn = coverage(batch["objects"], batch["target"], side)
        boxed_N = batch["use_box"].flatten(0, 1)
        point_N12 = batch["points"].flatten(0, 1)[:, None].float()
        box_N4 = batch["boxes"].flatten(0, 1).float()
        foreground_N1 = torch.ones_like(point_N12[..., 0])
        first = head.encode_mixed(point_N12, foreground_N1, box_N4, boxed_N)
        logits_NMnn, score_NM = head.decode_batch(embedding_BCgg, *first)
        losses, iou_NM = self._losses(logits_NMnn, score_NM, target_Nnn, valid_Nnn)
        rows = torch.arange(len(iou_NM), device=iou_NM.device)
        picked_N = iou_NM[rows, score_NM[:, 1:].argmax(1) + 1]
        best_N = iou_NM[:, 1:].argmax(1) + 1

        count = math.ceil(self.refined * prompts)
        if count:
            # The prompts are drawn at random, so each image's first ones are a random share.
            keep = (rows % prompts) < count
            mask_N1nn = logits_NMnn.detach()[rows, best_N][keep][:, None].float()
            new_N12, label_N1 = correction(
                mask_N1nn[:, 0], target_Nnn[keep], valid_Nnn[keep], batch["objects"].shape[-1]
            )
            points_N22 = torch.cat([point_N12[keep], new_N12], 1)
            labels_N2 = torch.cat([foreground_N1[keep], label_N1], 1)
            second = head.encode_mixed(points_N22, labels_N2, box_N4[keep], boxed_N[keep], mask_N1nn)
            decoded = head.decode_batch(embedding_BCgg, *second)
            refined, _ = self._losses(*decoded, target_Nnn[keep], valid_Nnn[keep])
            losses["refined"] = torch.stack(list(refined.values())).sum() * self.refined
        losses["dense"] = self.dense_weight * self.dense(embedding_BCgg, batch["objects"], _generator(batch))
        total = torch.stack(list(losses.values())).sum()
        errors = {"best_error": 1 - iou_NM[rows, best_N].mean(), "picked_error": 1 - picked_N.mean()}
        return {"loss": total, **losses, **errors}

    def _losses(
        self, logits_NMnn: Tensor, score_NM: Tensor, target_Nnn: Tensor, valid_Nnn: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        focal_NM, dice_NM, iou_NM = mask_losses(logits_NMnn.float(), target_Nnn, valid_Nnn, self.focal_norm)
        loss_NM = self.focal * focal_NM + self.dice * dice_NM
        if self.contour:
            loss_NM = loss_NM + self.contour * longer_contours(logits_NMnn.float(), target_Nnn, valid_Nnn)
        best = loss_NM[:, 1:].amin(1).mean()
        # A mask that never wins never learns; a little of the mean keeps all three alive.
        best = (1 - self.spread) * best + self.spread * loss_NM[:, 1:].mean()
        iou = self.iou * F.mse_loss(score_NM.float(), iou_NM)
        return {"best": best, "single": loss_NM[:, 0].mean(), "iou": iou}, iou_NM


class SameObject(nn.Module):
    """A loss that tells whether two pixels are of one object: logistic, on the scaled cosine of their embeddings.

    The pairs are of random pixels of an image, whose embeddings are a pixel shuffle of the image embedding. The head is
    discarded after training.
    """

    def __init__(self, channels: int, width: int = 16, upscale: int = 4, samples: int = 256):
        super().__init__()
        self.expand = nn.Conv2d(channels, width * upscale**2, 1)
        self.upscale, self.samples = upscale, samples
        self.log_scale = nn.Parameter(torch.tensor(5.0).log())
        self.bias = nn.Parameter(torch.tensor(0.0))

    def forward(self, embedding_BCgg: Tensor, labels_BSS: Tensor, generator: torch.Generator) -> Tensor:
        """Return the loss, with the same weight for positives and negatives; padding (label -1) is left out."""
        pixels_BDnn = F.pixel_shuffle(self.expand(embedding_BCgg), self.upscale).float()
        step = labels_BSS.shape[-1] // pixels_BDnn.shape[-1]
        label_Bn = labels_BSS[:, step // 2 :: step, step // 2 :: step].flatten(1).long()
        picks_BL = torch.multinomial(_by_object(label_Bn), self.samples, replacement=True, generator=generator)
        picked_BDL = pixels_BDnn.flatten(2).gather(2, picks_BL[:, None].expand(-1, pixels_BDnn.shape[1], -1))
        # Fresh embeddings share a large direction; unless it is removed, the loss does not fall for hundreds of steps.
        unit_BDL = F.normalize(picked_BDL - picked_BDL.mean(2, keepdim=True), dim=1)
        logits_BLL = self.log_scale.exp() * unit_BDL.transpose(1, 2) @ unit_BDL + self.bias
        label_BL = label_Bn.gather(1, picks_BL)
        same_BLL = label_BL[:, :, None] == label_BL[:, None]
        distinct_BLL = picks_BL[:, :, None] != picks_BL[:, None]
        positive, negative = same_BLL & distinct_BLL, ~same_BLL
        loss_BLL = F.softplus(torch.where(same_BLL, -logits_BLL, logits_BLL))
        positive, negative = ((loss_BLL * part).sum() / part.sum().clamp(min=1) for part in (positive, negative))
        return (positive + negative) / 2


def coverage(labels_BSS: Tensor, target_BP: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return the share (N, n, n) of each cell's real pixels that the target covers, and whether it has any (bool)."""
    step = labels_BSS.shape[-1] // side
    real_B1nn = F.avg_pool2d((labels_BSS >= 0).float()[:, None], step)
    hit_BPSS = labels_BSS[:, None] == target_BP[:, :, None, None]
    hit_BPnn = F.avg_pool2d(hit_BPSS.float(), step) / real_B1nn.clamp(min=1e-6)
    return hit_BPnn.flatten(0, 1), (real_B1nn > 0).expand_as(hit_BPnn).flatten(0, 1)


def mask_losses(
    logits_NMnn: Tensor, target_Nnn: Tensor, valid_Nnn: Tensor, focal_norm: str = "parts"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return focal (gamma 1) and dice losses and the IoU (no gradient), each (N, M), over the valid cells.

    Targets are shares in [0, 1]: focal is Lin et al. 2017, Eq. 5, with |y - p| for 1 - p_t and twice its value, so that
    an undecided cell costs its cross-entropy. `focal_norm` is what divides its sum:
    "parts": object and rest by their own areas, so that a fresh network does not drown small objects; a trained one
    then draws them too large.
    "object": the object's sum and half of the rest's by the object's area; with dice, a cell then goes to the object
    from a chance of about a third on, which suits an IoU of 0.7, but a small object lost in a large mask costs much.
    "image": both by the image's area, as SAM does (with weight 20), which leaves small objects to dice.
    The IoU is that of the thresholded cells with the object at full resolution.
    """
    y, valid = target_Nnn[:, None] * valid_Nnn[:, None], valid_Nnn[:, None].float()
    p = logits_NMnn.sigmoid()
    focal = 2 * (y - p).abs() * (F.softplus(logits_NMnn) - logits_NMnn * y)
    total_N1 = y.sum((2, 3))
    area_N1, rest = total_N1.clamp(min=1e-3), (1 - y) * valid
    rest_N1, cells_N1 = rest.sum((2, 3)).clamp(min=1e-3), valid.sum((2, 3)).clamp(min=1)
    object_N1, rest_N1 = {
        "parts": (2 * area_N1, 2 * rest_N1),
        "object": (2 * area_N1, 4 * area_N1),
        "image": (cells_N1, cells_N1),
    }[focal_norm]
    focal_NM = (focal * y).sum((2, 3)) / object_N1 + (focal * rest).sum((2, 3)) / rest_N1
    p = p * valid
    dice_NM = 1 - (2 * (p * y).sum((2, 3)) + 1) / (p.sum((2, 3)) + total_N1 + 1)
    with torch.no_grad():
        on = (logits_NMnn > 0) * valid
        intersection_NM = (on * y).sum((2, 3))
        iou_NM = intersection_NM / (on.sum((2, 3)) + total_N1 - intersection_NM).clamp(min=1e-6)
    return focal_NM, dice_NM, iou_NM


def longer_contours(logits_NMnn: Tensor, target_Nnn: Tensor, valid_Nnn: Tensor) -> Tensor:
    """Return (N, M), by how much a mask's contour is longer than the target's, as a share of the target's; at least 0.

    The length is the total variation of the probabilities (Mumford-Shah's smoothness term), between valid cells. Specks
    and holes have long contours for their area, and cost little in a loss that counts cells.
    """
    length_N1 = _variation(target_Nnn[:, None], valid_Nnn[:, None])
    excess_NM = _variation(logits_NMnn.sigmoid(), valid_Nnn[:, None]) - length_N1
    return excess_NM.clamp(min=0) / length_N1.clamp(min=4)  # 4 is the contour of one cell


def _variation(p_NMnn: Tensor, valid_N1nn: Tensor) -> Tensor:
    """Return the sum (N, M) of absolute differences between neighbours, both valid."""
    down = p_NMnn.diff(dim=2).abs() * (valid_N1nn[:, :, 1:] & valid_N1nn[:, :, :-1])
    right = p_NMnn.diff(dim=3).abs() * (valid_N1nn[..., 1:] & valid_N1nn[..., :-1])
    return down.sum((2, 3)) + right.sum((2, 3))


def correction(mask_Nnn: Tensor, target_Nnn: Tensor, valid_Nnn: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return a point (N, 1, 2) xy deep in the largest error of each mask's logits, and its label (N, 1), 1 or 0."""
    side = mask_Nnn.shape[-1]
    wanted_Nnn = target_Nnn > 0.5
    wrong_Nnn = (((mask_Nnn > 0) != wanted_Nnn) & valid_Nnn).float()
    depth_Nnn = F.avg_pool2d(wrong_Nnn[:, None], 7, 1, 3)[:, 0] * wrong_Nnn
    cell_N = depth_Nnn.flatten(1).argmax(1)
    xy_N2 = torch.stack([cell_N % side, cell_N // side], dim=1).float()
    label_N1 = wanted_Nnn.flatten(1).gather(1, cell_N[:, None]).float()
    step = size / side
    return (xy_N2 * step + (step - 1) / 2)[:, None], label_N1


def _by_object(label_Bn: Tensor) -> Tensor:
    """Return sampling weights (B, n): area^-1/2 of each pixel's object, so that small objects occur; 0 for padding."""
    images, most = len(label_Bn), int(label_Bn.max()) + 1
    real = label_Bn >= 0
    area = torch.zeros(images, most, device=label_Bn.device).scatter_add_(1, label_Bn.clamp(min=0), real.float())
    return area.clamp(min=1).rsqrt().gather(1, label_Bn.clamp(min=0)) * real


def _generator(batch: dict) -> torch.Generator:
    """Return a generator that depends on the batch alone, so that a resumed run draws the same pixels."""
    points = batch["points"]
    seed = int((points.double() * torch.tensor([1.0, 257.0], device=points.device)).sum().item())
    return torch.Generator(points.device).manual_seed(seed % 2**63)
