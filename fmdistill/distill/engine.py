"""The engine of the training loop: the process's rank, its device and precision, and values that are read late."""

import signal
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from fmdistill import stop
from fmdistill.backbones.device import has_bf16, pick_device
from fmdistill.launcher import check_training, processes
from fmdistill.recipe import Train
from fmdistill.registry import UserError


class Delayed:
    """Copies of values on a GPU, each read one call later, so that the program never waits for the step in progress.

    A value that is on the CPU is copied at once, but read one call later too.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, Any] | None = None

    def exchange(self, value: Tensor) -> Tensor | None:
        """Begin to copy `value` to the CPU; return the copy of the call before, None at the first call."""
        before = self.last()
        if value.is_cuda:
            copy = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending = copy, event
        else:
            self._pending = value.detach().clone(), None
        return before

    def last(self) -> Tensor | None:
        """Return the copy that `exchange` began last, waiting until it is complete; None if it was returned before."""
        if self._pending is None:
            return None
        (copy, event), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        return copy


@dataclass
class Engine:
    """The process's rank, its device and its precision."""

    settings: Train
    accelerator: Accelerator = field(init=False)
    _stops: Delayed = field(default_factory=Delayed, init=False)

    def __post_init__(self) -> None:
        check_training()
        device = pick_device(self.settings.device, "train.device")
        if device.index is not None and device.type != "mps":  # mps has a single device
            torch.get_device_module(device).set_device(device)
        try:  # "no": the recipe decides on autocast, not this machine's `accelerate config`
            self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
        except ValueError as error:  # another run of this process trained on another device
            raise UserError(f"train.device={self.settings.device}: {error}") from None
        self._check_device(device)
        check_share(self.settings, self.accelerator.num_processes)

    def _check_device(self, device: torch.device) -> None:
        """Raise a UserError unless accelerate chose the device and the number of processes that were requested."""
        picked, (_, world) = self.accelerator.device, processes()
        if picked.type != device.type and self.settings.device != "auto":
            raise UserError(
                f"train.device={self.settings.device}: accelerate trains on {picked.type} in this process; unset "
                f"ACCELERATE_USE_CPU and ACCELERATE_TORCH_DEVICE, or set train.device={picked.type}"
            )
        if self.accelerator.num_processes != world:
            raise UserError(
                f"train.device={self.settings.device}: {world} processes were started, but accelerate does not join "
                f"processes on {picked.type}; start one process, or train on cuda or cpu"
            )

    @property
    def micro_batch(self) -> int:
        """Return the number of images of one forward pass on one device."""
        return self.settings.batch_size // (self.accelerator.num_processes * self.settings.parts)

    def autocast(self) -> Any:
        """Return the autocast context of the recipe's precision."""
        device, precision = self.accelerator.device, self.settings.precision
        bf16 = precision == "bf16" or (precision == "auto" and (device.type == "cuda" or has_bf16(device)))
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true in any of the processes; all of them have to call it."""
        if self.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.accelerator.device)
        return float(self.accelerator.reduce(flags, "sum")) > 0  # type: ignore[arg-type]

    @property
    def _several_gpus(self) -> bool:
        return self.accelerator.num_processes > 1 and self.accelerator.device.type == "cuda"

    def check_stop(self) -> None:
        """Raise Stopped if any of the processes was asked to stop, so that all leave at the same step.

        Several processes on GPUs learn of a request one call later, since none of them waits for its GPU.
        """
        asks = stop.requested() is not None
        if not self._several_gpus:
            asks = self.any(asks)
        else:
            flags = torch.full((), float(asks), device=self.accelerator.device)  # torch.tensor would wait for the GPU
            before = self._stops.exchange(self.accelerator.reduce(flags, "sum"))  # type: ignore[arg-type]
            asks = before is not None and float(before) > 0
        if asks:
            raise stop.Stopped(stop.requested() or signal.SIGTERM)

    def mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Return each value's mean over the processes that have it; a process without labels may lack some."""
        names, device = sorted({name for own in gather_object([list(values)]) for name in own}), self.accelerator.device
        own = [values[name].detach().float() if name in values else torch.zeros((), device=device) for name in names]
        counts = torch.tensor([float(name in values) for name in names], device=device)
        sums, counts = self.accelerator.reduce(torch.stack([torch.stack(own), counts]), "sum")
        return dict(zip(names, (sums / counts).tolist(), strict=True))


def check_share(settings: Train, processes: int) -> None:
    """Raise a UserError unless an optimizer step's images divide evenly among processes and accumulation."""
    if not settings.divides(processes):
        raise UserError(
            f"train.batch_size={settings.batch_size}: not divisible by "
            f"{processes} processes x train.accumulate={settings.accumulate}; "
            f"it is the number of images of one optimizer step"
        )
