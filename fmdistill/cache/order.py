"""The order of training samples: a pure function of (seed, epoch, shards), so that a step number resumes it."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


def epoch_order(counts: Sequence[int], seed: int, epoch: int, window: int) -> np.ndarray:
    """Return (N, 2) rows of (shard, index): shards permuted, then samples permuted within a window of shards.

    `counts` are the samples of each shard, the shards in a fixed order; N is their sum.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, epoch]))
    shards = rng.permutation(len(counts))
    mixed = []
    for start in range(0, len(shards), window):
        group = shards[start : start + window]
        rows = np.concatenate([np.stack([np.full(counts[s], s), np.arange(counts[s])], axis=1) for s in group])
        mixed.append(rows[rng.permutation(len(rows))])
    return np.concatenate(mixed) if mixed else np.zeros((0, 2), dtype=np.int64)


@dataclass(frozen=True)
class Batches:
    """The micro-batches of process `rank`: step s takes global batch s, and each process its slice of it.

    An epoch drops the remainder that does not fill a batch; since every epoch is permuted anew it differs each time.
    """

    counts: tuple[int, ...]
    batch_size: int  # of the optimizer step, over all processes and accumulation
    seed: int
    window: int
    rank: int = 0
    world: int = 1
    accumulate: int = 1

    @property
    def identity(self) -> str:
        """Hash of all that the order depends on but the number of processes."""
        return hashlib.sha256(repr((self.counts, self.batch_size, self.seed, self.window)).encode()).hexdigest()[:16]

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch."""
        return sum(self.counts) // self.batch_size

    def between(self, start: int, stop: int) -> Iterator[list[tuple[int, int, int]]]:
        """Yield lists of (epoch, shard, index), `accumulate` lists for each step in [start, stop)."""
        micro = self.batch_size // (self.world * self.accumulate)
        assert micro * self.world * self.accumulate == self.batch_size and self.steps_per_epoch > 0
        epoch, rows = -1, np.zeros((0, 2), dtype=np.int64)
        for step in range(start, stop):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                rows = epoch_order(self.counts, self.seed, epoch, self.window)
            first = (step % self.steps_per_epoch) * self.batch_size + self.rank * micro * self.accumulate
            for part in range(self.accumulate):
                chosen = rows[first + part * micro : first + (part + 1) * micro]
                yield [(epoch, int(shard), int(index)) for shard, index in chosen]
