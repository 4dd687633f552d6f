"""What a process keeps of the images that it prepares."""

import numpy as np
import pytest

from fmdistill.images.memory import ImageMemory


def test_what_fits_is_made_once_and_what_does_not_every_time():
    made = []

    def make(name):
        return lambda: made.append(name) or np.zeros({"small": 3, "large": 8, "last": 2}[name], np.uint8)

    memory = ImageMemory(10e-9)
    for _ in range(2):
        assert [len(memory.get(name, make(name))) for name in ("small", "large", "last")] == [3, 8, 2]
    assert made == ["small", "large", "last", "large"]
    assert memory.free == pytest.approx(5)
