"""Knowledge distillation (KD)."""

# Legend: B images, K classes.

from dataclasses import dataclass

from torch import Tensor

from fmdistill.distill.distances.mse import require_same_shape
from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError


@dataclass(frozen=True)
class KD:
    """T^2 KL(softmax(t / T) || softmax(s / T)) between teacher and student logits, one value per sample.

    (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.) Common settings: T = 4 with 0.1 cross-entropy
    and 0.9 KD on CIFAR-100, T = 1 with 0.5 of each on ImageNet.
    """

    temperature: float = 4.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def __call__(self, seen: Seen) -> Tensor:
        """Return (B,) for logits (B, K). Raises UserError for maps."""
        student_BK, teacher_BK = logits_pair(seen, "distance.name=kd")
        return softened_kl(student_BK, teacher_BK, self.temperature)


def softened_kl(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(softmax(t / T) || softmax(s / T)), (B,); T^2 keeps the gradient's size about equal for any T."""
    log_s_BK, log_t_BK = ((logits / temperature).log_softmax(1) for logits in (student_BK, teacher_BK))
    return temperature**2 * (log_t_BK.exp() * (log_t_BK - log_s_BK)).sum(1)


def logits_pair(seen: Seen, setting: str) -> tuple[Tensor, Tensor]:
    """Return the student's and the teacher's logits, both (B, K).

    Raises UserError if their shapes differ or they are maps; the error names `setting`.
    """
    student, teacher = require_same_shape(seen)
    return require_logits(student, setting), require_logits(teacher, setting)


def require_logits(output: Tensor, setting: str) -> Tensor:
    """Return `output` (B, K) unchanged. Raises UserError that names `setting` if it is a map."""
    if output.dim() != 2:
        raise UserError(
            f"{setting}: its softmax is over classes, but the channels of a map {tuple(output.shape[1:])} are not "
            f"classes; choose an output of logits, or compare maps by mse, cosine, fitnet or at"
        )
    return output


def check_temperature(temperature: float) -> None:
    """Raise a UserError unless `temperature` is above 0."""
    if not temperature > 0:
        raise UserError(f"distance.temperature={temperature}: expected a number above 0")
