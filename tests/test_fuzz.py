"""A few hundred damaged and hostile inputs; `python tests/fuzz.py 10000` feeds the thousands."""

import fuzz
import pytest

from fmdistill.registry import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")


def test_damaged_and_hostile_inputs_get_values_or_one_line(tmp_path):
    ends, wrong = fuzz.fuzz(tmp_path, 360, seed=1)
    assert not wrong, "\n".join(wrong)
    kinds = {name for name, _ in ends}
    assert len(kinds) == 6 and sum(count for (_, end), count in ends.items() if end == "values") > 20


def test_the_fuzzer_sees_what_must_not_happen(tmp_path, monkeypatch):
    outside = tmp_path / "outside"

    def careless(data: bytes) -> str:
        if len(data) % 2:
            raise KeyError("codec")
        outside.write_bytes(data)
        raise UserError("one line")

    monkeypatch.setattr(fuzz, "decoded", careless)
    _, wrong = fuzz.fuzz(tmp_path, 40, only="JPEG")
    assert any("KeyError" in line for line in wrong) and any(line.endswith("outside") for line in wrong)
