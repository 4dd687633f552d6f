"""Toy students that fail as training fails: an image or a gradient of NaN, no movement, too little memory."""

import tiny
import torch

BRIGHT = 0.5  # mean of a prepared image; of the toy recipe's training images only this one's is larger
KEY = "china-0001"


class NanImage(tiny.Student):
    """The toy student, which sees the bright image as NaN while it is trained."""

    least = BRIGHT

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {"embedding": (B, 32, 4, 4)}."""
        bright_B = image.flatten(1).mean(1) > self.least
        if self.training:
            image = torch.where(bright_B[:, None, None, None], torch.nan, image)
        return super().forward(image)


class NanImages(NanImage):
    """The toy student, which sees all images as NaN while it is trained."""

    least = -torch.inf


class NanImageStill(NanImage):
    """The student of `NanImage` with its BatchNorm frozen, whose statistics would differ between processes."""

    def train(self, mode: bool = True):
        super().train(mode)
        self.net[1].eval()
        return self


class NanGradient(tiny.Student):
    """The toy student, whose gradient is NaN for a batch with the bright image; its loss is finite."""

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {"embedding": (B, 32, 4, 4)}."""
        embedding = super().forward(image)["embedding"]
        if self.training and (image.flatten(1).mean(1) > BRIGHT).any():
            embedding = embedding + (0 * embedding).sum().sqrt()  # 0, whose derivative is 0 * infinity
        return {"embedding": embedding}


class Hungry(tiny.Student):
    """The toy student on a device whose memory is full with more than `LIMIT` images in training."""

    LIMIT = 3

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {"embedding": (B, 32, 4, 4)}."""
        if self.training and len(image) > self.LIMIT:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return super().forward(image)
