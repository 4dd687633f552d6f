"""Run the teacher over shards in this process, decoding images ahead, in batches that never cross shards.

Any number of processes may run in one folder. Those that torchrun or `accelerate launch` starts divide the shards.
"""

import math
import os
import random
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from tqdm import tqdm

from fmdistill import stop
from fmdistill.cache import captions, sidecar
from fmdistill.cache.outputs import StoredOutput
from fmdistill.cache.prefetch import LARGE, Waiting, advice, depth, prefetched
from fmdistill.cache.prepare import prepare
from fmdistill.cache.store import Store
from fmdistill.cache.writer import ShardWriter, TeacherInput, image_hash
from fmdistill.files import being_written
from fmdistill.images import DecodeError, Encoded, Images, Shard
from fmdistill.images.picture import summary
from fmdistill.launcher import processes
from fmdistill.logs import log
from fmdistill.registry import UserError
from fmdistill.teachers.family import Teacher

BEHIND = 2  # batches of outputs that wait to be encoded and written
TIMED = 3  # batches that the time left is estimated from, after one that warms up


@dataclass
class Pass:
    """One teacher pass over the missing shards: its inputs, and its progress so far."""

    teacher: Teacher
    images: Images
    store: Store
    identity: str
    outputs: Mapping[str, StoredOutput]
    max_failed: float
    expected: int  # images of all processes, for the time left
    seen: int = 0
    failed: int = 0
    conversions: Counter[str] = field(default_factory=Counter)  # images by what decoding did to them
    marks: list[tuple[float, int]] = field(default_factory=list)  # seconds and images seen after the first batches
    waiting: Waiting = field(default_factory=Waiting)

    def run(self, shards: list[Shard], bar: tqdm) -> None:
        """Write every shard of the list that no other process finishes meanwhile, one after the other.

        Shards that another process seems to be writing come last: that process may be slow, or dead.
        """
        others: list[Shard] = []
        before = self.seen
        self.conversions.clear()
        for shard in stop.between(chain(shards, others)):  # the latter grows while the shards are gone through
            self.store.look(shard.name)
            finished = sidecar.finished(self.store, shard, self.identity, self.outputs)
            if finished is None and shard not in others and being_written(self.store.folder / f"{shard.name}.tar"):
                others.append(shard)
            elif finished is None:
                self.write(shard, bar)
            else:
                bar.update(len(finished.fields["samples"]) + len(finished.fields["failed"]))
        if converted := summary(self.conversions, self.seen - before):
            log.info("%s", converted)
        if self.seen:
            log.info("%s", advice(self.waiting.share, self.teacher.workers, os.cpu_count() or 1))

    def write(self, shard: Shard, bar: tqdm) -> None:
        """Write one shard, which becomes visible only when it is complete."""
        writer = ShardWriter(self.store, shard, self.identity, self.outputs)
        try:
            self._run_teacher(writer, bar)
            if not writer.samples and not writer.failed:
                raise UserError(f"{shard.name}: holds no image; remove it from the images, or restore it")
            writer.publish()
            self.store.send(shard.name)
        except BaseException:
            writer.abandon()
            raise

    def _batches(self, shard: Shard) -> Iterator[list[TeacherInput]]:
        batch, workers = self.teacher.batch, self.teacher.workers
        ahead = depth(batch, workers, self.teacher.preprocess.image_size)
        encoded, prepared = self.images.read(shard), partial(self._prepare, shard.name)
        return self.waiting.counted(prefetched(encoded, prepared, batch=batch, workers=workers, ahead=ahead))

    def _prepare(self, shard: str, index: int, encoded: Encoded) -> TeacherInput:
        item = TeacherInput(index, encoded.key, image_hash(encoded.data), encoded.label)
        if count := captions.count_of(self.teacher):
            try:
                item.captions = captions.chosen(shard, encoded, count)
            except UserError as error:
                item.problem = str(error)
                return item
            if not item.captions:
                item.problem = captions.MISSING
                return item
        try:
            image = prepare(self.images, self.teacher.preprocess, encoded, shard)
        except DecodeError as error:
            item.problem = f"cannot be decoded: {error}"
            return item
        item.original, item.conversions = image.original, image.conversions
        item.pixels, item.resized = image.pixels, image.size
        return item

    def _run_teacher(self, writer: ShardWriter, bar: tqdm) -> None:
        """Run the teacher batch by batch; a thread writes its outputs, in order, while it works on the next batch."""
        waiting: deque[Future[None]] = deque()
        with ThreadPoolExecutor(1) as thread:
            try:
                for batch in stop.between(self._batches(writer.shard)):
                    good = [item for item in batch if item.pixels is not None]
                    sizes_B2 = torch.tensor([item.resized for item in good])
                    pixels = [item.pixels for item in good if item.pixels is not None]
                    outputs = self.teacher(torch.stack(pixels), sizes_B2) if good else {}
                    outputs |= captions.embedded(self.teacher, [item.captions for item in good])
                    waiting.append(thread.submit(self._write_batch, writer, batch, good, sizes_B2, outputs, bar))
                    if len(waiting) > BEHIND:
                        waiting.popleft().result()
                while waiting:
                    waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _write_batch(
        self,
        writer: ShardWriter,
        batch: list[TeacherInput],
        good: list[TeacherInput],
        sizes_B2: Tensor,
        outputs: dict[str, Tensor],
        bar: tqdm,
    ) -> None:
        for item in batch:
            self.conversions.update(item.conversions)
            if item.pixels is None:
                self._fail(writer, item, item.problem)
        if good:
            finite_B = _finite(outputs)
            if self.seen == 0 and not finite_B.any():
                raise UserError(
                    f"{writer.shard.name}: every output of the first batch is non-finite; "
                    f"check teacher.weights, or try teacher.dtype=fp32"
                )
            valid_BHW = self.teacher.preprocess.valid(sizes_B2).numpy()
            for i, item in enumerate(good):
                if finite_B[i]:
                    before = len(writer.failed)
                    writer.add(item, {name: x[i].numpy() for name, x in outputs.items()}, valid_BHW[i])
                    self.failed += len(writer.failed) - before
                else:
                    self._fail(writer, item, "non-finite output, set aside")
        self.seen += len(batch)
        self._check_failures(writer)
        if len(self.marks) > TIMED:
            share = self.waiting.share
            bar.set_postfix_str(f"{share:.0%} waiting for images" if share > LARGE else "", refresh=False)
        bar.update(len(batch))
        self._log_time_left()

    def _log_time_left(self) -> None:
        if len(self.marks) > TIMED:
            return
        self.marks.append((time.monotonic(), self.seen))
        left = self.expected - self.seen
        if len(self.marks) > TIMED and left > 0:
            (start, before), (now, after) = self.marks[0], self.marks[-1]
            rate = processes()[1] * (after - before) / max(now - start, 1e-9)  # the others taken to be as fast
            hours, minutes = divmod(math.ceil(left / rate / 60), 60)
            log.info("%.3g images/s; about %d:%02d hours for the %d images left", rate, hours, minutes, left)

    def _fail(self, writer: ShardWriter, item: TeacherInput, problem: str) -> None:
        writer.fail(item, problem)
        self.failed += 1
        log.warning("%s: image '%s' skipped: %s", writer.shard.name, item.key, problem)

    def _check_failures(self, writer: ShardWriter) -> None:
        # Early on a single bad image is a large share, so the share is taken of at least a hundred images.
        of = max(self.seen, min(self.expected, 100))
        if self.failed > self.max_failed * of:
            enough = min(1.0, math.ceil(200 * self.failed / of) / 100)  # twice the share so far
            raise UserError(
                f"{writer.shard.name}: {self.failed} of {self.seen} images gave no output, more than "
                f"cache.max_failed={self.max_failed:g}; the last: '{writer.failed[-1]['key']}' "
                f"({writer.failed[-1]['problem']}). Repair or remove them, or allow more of them, such as "
                f"cache.max_failed={enough:g}"
            )


def _finite(outputs: dict[str, Tensor]) -> Tensor:
    return torch.stack([x.isfinite().flatten(1).all(1) for x in outputs.values()]).all(0)


def own_shards_first(shards: Sequence[Shard], rank: int, world: int) -> list[Shard]:
    """Return all shards, this process's share first, then the other processes' in an order of its own.

    So a process that is done helps slow or dead ones, and two helpers seldom choose the same shard.
    """
    rest = [shard for place, shard in enumerate(shards) if place % world != rank]
    random.Random(rank).shuffle(rest)
    return [*shards[rank::world], *rest]
