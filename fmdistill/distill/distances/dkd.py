"""Decoupled knowledge distillation (DKD)."""

# Legend: B images, K classes, O = K - 1 classes other than the label.

from dataclasses import dataclass

import torch
from torch import Tensor

from fmdistill.distill.distances.kd import check_temperature, logits_pair, softened_kl
from fmdistill.distill.seen import Seen


@dataclass(frozen=True)
class DKD:
    """alpha TCKD + beta NCKD, one value per sample: target-class and non-target-class distillation, weighted apart.

    TCKD is T^2 KL between (p_y, 1 - p_y) of teacher and student; NCKD is T^2 KL between their softmax over the classes
    other than y. Plain KD is TCKD + (1 - p_y of the teacher) NCKD. (Zhao et al., "Decoupled Knowledge Distillation",
    CVPR 2022.) The authors warm it up over 20 epochs on CIFAR-100 (`warmup: 20` of the term) and over 1 on ImageNet;
    their beta is 1 to 8, depending on the pair of networks, and 0.5 or 2 at T = 1 on ImageNet.
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def __call__(self, seen: Seen) -> Tensor:
        """Return (B,) for logits (B, K). Raises UserError for maps, or if an image has no label."""
        setting = "distance.name=dkd"
        pair, label_B = logits_pair(seen, setting), seen.labels(setting)
        (target_s_B2, other_s_BO), (target_t_B2, other_t_BO) = (decouple(z, label_B, self.temperature) for z in pair)
        target_B = softened_kl(target_s_B2, target_t_B2, self.temperature)
        other_B = softened_kl(other_s_BO, other_t_BO, self.temperature)
        return self.alpha * target_B + self.beta * other_B


def decouple(logits_BK: Tensor, label_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the logits (B, 2) of the label against all other classes, and the logits (B, K - 1) of the others.

    The softmax of the first at `temperature` is (p_y, 1 - p_y), without the rounding error of computing 1 - p_y.
    """
    label_B1 = label_B[:, None]
    index_O = torch.arange(logits_BK.shape[1] - 1, device=logits_BK.device)
    other_BO = logits_BK.gather(1, index_O + (index_O >= label_B1))
    rest_B1 = temperature * (other_BO / temperature).logsumexp(1, keepdim=True)
    return torch.cat([logits_BK.gather(1, label_B1), rest_B1], 1), other_BO
