"""The sizes of students: parameters and multiply-adds as arithmetic says, for names that timm has."""

import pytest
import tiny

from fmdistill.cli import main
from fmdistill.distill import sizes
from fmdistill.registry import UserError


def test_a_student_s_multiply_adds_are_those_of_its_layers():
    measured = sizes.measure("mine", tiny.Student())
    first, second = (3 * 8 * 8) * 16 * (8 * 8), (16 * 3 * 3) * 32 * (4 * 4)  # inputs x outputs x positions
    assert (measured.side, measured.macs) == (64, first + second)
    assert measured.parameters == (3 * 64 * 16 + 16) + 2 * 16 + (16 * 9 * 32 + 32)


@pytest.mark.slow
def test_the_verb_prints_a_line_for_each_student_that_a_backbone_can_be(capsys):
    assert main(["students", "convnext_att?", "mobilenetv4_conv_small"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:-1]] == [
        ["timm_sam", "model=convnext_atto"],
        ["timm_clip", "model=convnext_atto"],
        ["timm_sam", "model=mobilenetv4_conv_small"],  # open_clip cannot build a tower of it
    ]
    assert lines[1].split()[2:4] == ["1024", "px"] and lines[2].split()[2:4] == ["224", "px"]


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(UserError, match=r"students repvit_m9: timm has no such model\. Did you mean 'repvit_m0_9'"):
        list(sizes.sizes(["repvit_m9"]))


def test_the_well_known_backbones_are_timm_s():
    assert [name for name in sizes.KNOWN if sizes._matching(name) != [name]] == []
