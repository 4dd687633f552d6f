"""Measure a device's matrix multiplication speed, a network's FLOPs, and the times of several functions fairly."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT, Sam
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fmdistill import stop

K = TypeVar("K", bound=Hashable)
# Sides of square matrices: large enough for the device's highest speed, and still quick.
SIDE = {"cuda": 8192, "cpu": 1536}


def matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Return the most FLOP/s that a product of two square matrices reaches on `device` within about `seconds`."""
    side = SIDE.get(device.type, SIDE["cuda"])
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = {"product": lambda: a @ b}
    start, least = time.perf_counter(), take_turns(product, device, 2)["product"]
    while time.perf_counter() - start < seconds:
        least = min(least, take_turns(product, device, 1)["product"])
    return 2 * side**3 / least


def flops(module: Callable[..., Any], *inputs: Any) -> int:
    """Call `module` and return the FLOPs of the call, two per multiply-add, as torch.utils.flop_counter counts them.

    It counts PyTorch's products, convolutions and attention, whoever calls them, but no custom kernels.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    # The counter does not know the CPU's fused attention, nor the kernel of a whole nn.MultiheadAttention.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def encoder_flops(encoder: ImageEncoderViT, batch: int = 1) -> float:
    """Return the FLOPs of segment_anything's own forward for `batch` images, two per multiply-add; it is not run."""
    empty = {name: tensor.to("meta") for name, tensor in encoder.state_dict().items()}
    pixels = torch.empty(batch, 3, encoder.img_size, encoder.img_size, device="meta")
    with torch.inference_mode(False), torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(encoder, empty, (pixels,))
    return float(counter.get_total_flops())


def predictor_pass(sam: Sam, images: Sequence[np.ndarray]) -> torch.Tensor:
    """Call SamPredictor.set_image on each of `images`, uint8 (H, W, 3) RGB; return the last embedding."""
    predictor = SamPredictor(sam)
    for image in images:
        predictor.set_image(image)
    return predictor.get_image_embedding()


def take_turns(
    works: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int = 3, waits: bool = False
) -> dict[str, float]:
    """Return the shortest time in seconds of each of `works`, called in turn so that a busy machine slows all alike.

    With `waits`, the time spent waiting for a disk or for other threads counts. Without it, if PyTorch uses a single
    CPU thread, only processor time counts, which other programs on the machine do not lengthen.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1 and not waits
    clock = time.process_time if alone else time.perf_counter
    return {name: max(min(seconds), 1e-9) for name, seconds in durations(works, device, rounds, clock).items()}


def durations(
    works: Mapping[K, Callable[[], Any]],
    device: torch.device,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[K, list[float]]:
    """Return the seconds of each round of each of `works`, which are called in turn."""
    seconds: dict[K, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in stop.between(works.items()):
            _wait(device)
            start = clock()
            work()
            _wait(device)
            seconds[name].append(clock() - start)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
