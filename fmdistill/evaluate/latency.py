"""Measure the size and the speed of students and their teacher: parameters, multiply-adds, milliseconds, memory.

Legend: B images of a batch, S the square's side, C channels, g tokens a side.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fmdistill import teachers
from fmdistill.backbones.clip import TextHead, WholeClip, open_tokenizer
from fmdistill.backbones.device import cores, pick_device, product_name
from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.throughput import durations, flops
from fmdistill.cache import open_cache
from fmdistill.distill.student import own_head
from fmdistill.evaluate import results
from fmdistill.evaluate.annotated import DType
from fmdistill.evaluate.results import TEACHER, Judged, Metric, Row
from fmdistill.evaluate.teacher_score import check_weights
from fmdistill.logs import log
from fmdistill.predict import sam_onnx
from fmdistill.predict.artefact import Artefact
from fmdistill.predict.clip_onnx import embed_batches
from fmdistill.predict.onnx_session import Session, onnxruntime, weights
from fmdistill.predict.onnx_student import OnnxStudent, open_student
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError
from fmdistill.teachers.compute import computing
from fmdistill.teachers.sam import SamTeacher

ENCODER, DECODER, TEXT = "encoder", "decoder", "text"
PROMPT = "a photo of a cat"
PARAMETERS = "Parameters, in millions; of an ONNX file the numbers of its weights."
MACS = "MACs: multiply-adds for one image, prompt or text, in billions; 1 MAC = 2 FLOPs. Not counted in ONNX files."
MILLISECONDS = (
    "ms: the median time of one image, prompt or text; its interval is the quartiles. Not for other machines."
)
MEMORY = "Peak memory: what a call allocates on a GPU beside the weights, in MB. Not measured on a CPU."
MACHINE = "Times and memory are those of one machine and its settings, and only rows of one run are comparable."


@dataclass(frozen=True)
class Latency:
    """Parameters, MACs, milliseconds and a GPU's peak memory of the encoder, and of SAM's decoder or CLIP's text tower.

    Everything is measured `rounds` times after `warm_up`, all parts of all subjects in turn. The encoder gets `batch`
    images of normal noise, the decoder one point (its masks are then upsampled to the square image), the text tower one
    short text. `threads` are those of PyTorch and ONNX Runtime; null leaves their number. With `teacher`, the recipe's
    teacher is loaded and measured too: from uint8 pixels to an output on the CPU, as it fills a cache.
    """

    batch: int = 1
    rounds: int = 20
    warm_up: int = 3
    threads: int | None = None
    teacher: bool = False
    device: str = "auto"
    dtype: DType = "fp32"

    metrics: ClassVar[Mapping[str, Metric]] = {
        "parameters": Metric("parameters, M", across="part", better="lower", help=PARAMETERS),
        "macs": Metric("MACs, G", across="part", better="lower", help=MACS),
        "milliseconds": Metric("ms", across="part", help=MILLISECONDS),
        "peak_memory": Metric("peak memory, MB", across="part", help=MEMORY),
    }
    dimensions: ClassVar[Mapping[str, str]] = {"machine": MACHINE}

    def __post_init__(self) -> None:
        """Raise a UserError for settings that measure nothing."""
        for name, least in (("batch", 1), ("rounds", 1), ("warm_up", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}={value}: expected {least} or more")

    def check(self, recipe: Recipe) -> None:
        """Raise a UserError if the teacher shall be measured and its weights are missing."""
        if self.teacher:
            check_weights(recipe)

    def inputs(self) -> list[str]:
        """Return JSON of what a result depends on instead of images: the machine."""
        return [
            product_name(pick_device(self.device, "device")),
            *map(str, (torch.__version__, self._threads, cores())),
        ]

    def judge(self, recipe: Recipe, students: Mapping[str, nn.Module]) -> Judged:
        """Measure the students by name, and the teacher if requested; details have each round's milliseconds."""
        device = pick_device(self.device, "device")
        with _threads(self._threads):
            parts = {(name, part.name): part for name, student in students.items()
                     for part in self._parts(recipe, student, device)}  # fmt: skip
            if self.teacher:
                parts[TEACHER, ENCODER] = self._teacher(recipe, device)
            works = {key: part.work for key, part in parts.items()}
            with torch.inference_mode():
                durations(works, device, self.warm_up)
                seconds = durations(works, device, self.rounds)
            rows: list[Row] = []
            times: list[dict[str, Any]] = []
            for (subject, name), part in parts.items():
                machine = f"{product_name(device)}, {part.runtime}, threads={self._threads}"
                milliseconds = [1000 * second / part.images for second in seconds[subject, name]]
                rows += _rows(subject, part, milliseconds, device, machine)
                shared = {"subject": subject, "part": name, "batch": part.images, "machine": machine}
                times.append({**shared, "milliseconds": milliseconds})
        return rows, {"times": times}

    @property
    def _threads(self) -> int:
        return self.threads or torch.get_num_threads()

    def _parts(self, recipe: Recipe, student: nn.Module, device: torch.device) -> "Iterator[Part]":
        """Yield the parts of one student."""
        if isinstance(student, OnnxStudent):
            if device.type != "cpu":
                raise UserError(f"device={self.device}: ONNX files are run on the CPU; set device=cpu")
            yield from onnx_parts(student.artefact, self.batch, self._threads)
            return
        size = getattr(student, "image_size", None)
        if size is None:
            raise UserError(f"latency: {type(student).__name__} has no image_size, the side of its square images")
        head = _head(recipe, student)
        encoder: Any = student.whole().visual if isinstance(student, WholeClip) else student
        encoder.to(device).eval().requires_grad_(False)  # else the counter of FLOPs follows gradients
        image_B3SS = noise(self.batch, 3, size, size).to(device)
        within = count(head) if head is not None and head in student.children() else 0
        yield self._part(ENCODER, lambda: encoder(image_B3SS), device, count(encoder) - within, self.batch)
        if head is not None:
            head.to(device).eval().requires_grad_(False)
        if isinstance(head, PromptHead):
            yield self._part(DECODER, decoder(head, device), device, count(head))
        elif head is not None:
            tokens, text = head.tokenizer([PROMPT]).to(device), head.text_model
            yield self._part(TEXT, lambda: text.encode_text(tokens, normalize=False), device, count(head))

    def _part(
        self, name: str, work: Callable[[], Any], device: torch.device, parameters: int, images: int = 1
    ) -> "Part":
        def compute() -> None:
            with computing(self.dtype, device):
                work()

        runtime = f"torch {torch.__version__}, {self.dtype}"
        return Part(name, compute, runtime, images, parameters, lambda: flops(compute))

    def _teacher(self, recipe: Recipe, device: torch.device) -> "Part":
        """Return the teacher's encoder; on this device and in this precision if its builder is the package's."""
        settings, record = dict(recipe.teacher or {}), teachers.family_of(recipe.teacher)
        if record is not None:
            settings |= {"device": str(device), "dtype": self.dtype, "batch": self.batch}
        teacher: Any = teachers.build(settings)
        size = teacher.preprocess.image_size
        pixels_B3SS = torch.randint(0, 256, (self.batch, 3, size, size), dtype=torch.uint8)
        sizes_B2 = torch.full((self.batch, 2), size)
        reference = None if record is None else record.reference(teacher)
        tower = teacher.sam.image_encoder if isinstance(teacher, SamTeacher) else getattr(teacher, "visual", None)
        return Part(
            ENCODER,
            lambda: teacher(pixels_B3SS, sizes_B2),
            f"torch {torch.__version__}, {getattr(teacher, 'dtype', self.dtype)}",
            self.batch,
            None if tower is None else count(tower),
            (lambda: flops(teacher, pixels_B3SS, sizes_B2))
            if reference is None
            else lambda: self.batch * reference.flops(),
        )


@dataclass(frozen=True)
class Part:
    """A network to measure: a call on `images` inputs, its number of parameters, and a function that counts FLOPs."""

    name: str
    work: Callable[[], Any]
    runtime: str
    images: int
    parameters: int | None  # None if not known
    flops: Callable[[], int] | None = None


def onnx_parts(artefact: Artefact, batch: int, threads: int) -> list[Part]:
    """Return the networks of an exported folder; the decoder is its predictor's `predict` of one point."""
    model, student = artefact.model, open_student(artefact, threads)
    clip = artefact.kind == "clip"
    size = int(model["preprocess"]["image_size"] if clip else model["image_size"])
    image_B3SS = noise(batch, 3, size, size).numpy()
    if clip:
        embed = embed_batches(Session(artefact.path(model["text"]), threads))
        tokenizer = open_tokenizer(model["clip"], artefact.folder / model["tokenizer_files"])
        tokens = tokenizer([PROMPT], context_length=model["context_length"]).numpy()
        other = (TEXT, model["text"], lambda: embed(tokens))
    else:
        predictor = sam_onnx.open_artefact(artefact, threads=threads)
        predictor.set_image(np.zeros((size, size, 3), np.uint8))
        point = (np.full((1, 2), size / 2), np.ones(1))
        other = (DECODER, model["decoder"], lambda: predictor.predict(*point))
    encoder = (ENCODER, model["image" if clip else "encoder"], lambda: student.embed(image_B3SS))
    runtime = f"onnxruntime {onnxruntime().__version__}, {artefact.precision}"
    return [
        Part(name, work, runtime, batch if name == ENCODER else 1, weights(artefact.path(file)))
        for name, file, work in (encoder, other)
    ]


def decoder(head: PromptHead, device: torch.device) -> Callable[[], Any]:
    """Return a call of SAM's prompt encoder and mask decoder for one point, whose masks are upsampled to S x S."""
    size, grid = head.config["image_size"], head.config["image_embedding_size"]
    embedding_Cgg = noise(head.config["embed_dim"], grid, grid).to(device)
    point, label = torch.full((1, 1, 2), size / 2, device=device), torch.ones((1, 1), device=device)

    def decode() -> Tensor:
        return head.upsample(head.decode(embedding_Cgg, point, label)[0], (size, size), (size, size))

    return decode


def count(module: nn.Module) -> int:
    """Return the number of a network's parameters, without its buffers."""
    return sum(parameter.numel() for parameter in module.parameters())


def noise(*shape: int) -> Tensor:
    """Return normal noise, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _head(recipe: Recipe, student: nn.Module) -> PromptHead | TextHead | None:
    """Return the student's own head, or that of the cached teacher; None if neither has one or the cache is gone."""
    own = own_head(student) or getattr(student, "head", None)
    if isinstance(own, PromptHead):
        return own
    if isinstance(student, WholeClip):
        return TextHead.from_clip(student.whole(), student.config)
    try:
        head = None if recipe.cache is None else open_cache(recipe).head()
    except UserError as error:
        log.warning("latency: the teacher's head is not measured: %s", error)
        return None
    return head if isinstance(head, PromptHead | TextHead) else None


def _rows(subject: str, part: Part, milliseconds: list[float], device: torch.device, machine: str) -> list[Row]:
    rows = []
    if part.parameters is not None:
        rows.append(results.row(subject, "parameters", part.parameters / 1e6, part=part.name))
    if part.flops is not None:
        rows.append(results.row(subject, "macs", part.flops() / part.images / 2e9, part=part.name))
    measured = {"part": part.name, "batch": part.images, "machine": machine}
    low, median, high = np.percentile(milliseconds, [25, 50, 75])
    row = results.row(subject, "milliseconds", median, len(milliseconds), **measured)
    quartiles = f"quartiles of {len(milliseconds)} rounds"
    rows.append({**row, "low": float(low), "high": float(high), "interval": quartiles})
    if device.type == "cuda":
        rows.append(results.row(subject, "peak_memory", _peak_megabytes(part.work, device), **measured))
    return rows


@torch.inference_mode()
def _peak_megabytes(work: Callable[[], Any], device: torch.device) -> float:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Compute on this number of threads within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
