"""The order is a pure function of (seed, epoch, shards)."""

import numpy as np
import pytest

from fmdistill.cache.order import Batches, epoch_order

COUNTS = (7, 1, 12, 3, 9, 5, 4)


def rows(order: np.ndarray) -> list[tuple[int, int]]:
    return [tuple(row) for row in order.tolist()]


def test_every_sample_comes_once_and_epochs_differ():
    wanted = sorted((s, i) for s, count in enumerate(COUNTS) for i in range(count))
    first, second = (rows(epoch_order(COUNTS, 3, epoch, 2)) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == wanted
    assert first != second
    assert first == rows(epoch_order(COUNTS, 3, 0, 2)) != rows(epoch_order(COUNTS, 4, 0, 2))


def test_samples_mix_within_a_window_of_shards_only():
    order = rows(epoch_order(COUNTS, 0, 0, 2))
    shards = list(dict.fromkeys(s for s, _ in order))
    for start in range(0, len(COUNTS), 2):
        window = shards[start : start + 2]
        size = sum(COUNTS[s] for s in window)
        assert {s for s, _ in order[:size]} == set(window)
        order = order[size:]


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_processes_and_accumulation_share_the_same_global_batch(world, accumulate):
    whole = list(Batches(COUNTS, 8, 0, 2).between(0, 11))
    parts = [Batches(COUNTS, 8, 0, 2, rank, world, accumulate) for rank in range(world)]
    pieces = [list(part.between(0, 11)) for part in parts]
    for step, batch in enumerate(whole):
        joined = [place for piece in pieces for k in range(accumulate) for place in piece[step * accumulate + k]]
        assert joined == batch


def test_a_resumed_order_continues_with_the_very_next_batch():
    plan = Batches(COUNTS, 8, 1, 3)
    assert list(plan.between(0, 17))[9:] == list(plan.between(9, 17))


def test_the_dropped_remainder_differs_between_epochs():
    plan = Batches(COUNTS, 8, 0, 7)
    assert plan.steps_per_epoch == sum(COUNTS) // 8
    every = {(s, i) for s, count in enumerate(COUNTS) for i in range(count)}
    used = [{p[1:] for batch in plan.between(e * 5, e * 5 + 5) for p in batch} for e in range(2)]
    assert [len(u) for u in used] == [40, 40]
    assert every - used[0] != every - used[1]
