"""What a process keeps of what it has made."""

import pytest

from fmdistill.images.kept import Kept


def test_what_fits_is_made_once_and_what_does_not_every_time():
    made = []

    def make(name):
        return lambda: made.append(name) or "x" * {"small": 3, "large": 8, "last": 2}[name]

    kept = Kept(10e-9, len)
    for _ in range(2):
        assert [len(kept.get(name, make(name))) for name in ("small", "large", "last")] == [3, 8, 2]
    assert made == ["small", "large", "last", "large"]
    assert kept.free == pytest.approx(5)
