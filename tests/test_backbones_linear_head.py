"""The last layer that is stored beside a classifier's features."""

import pytest
import torch
from torch import nn

from fmdistill import teachers
from fmdistill.backbones.linear_head import LinearHead
from fmdistill.registry import UserError


@pytest.mark.parametrize("bias", [True, False])
def test_a_saved_head_is_loaded_unchanged(tmp_path, bias):
    layer = nn.Linear(6, 4, bias=bias)
    LinearHead.of(layer).save(tmp_path)
    head, feature = teachers.load_family("classifier").head.load(tmp_path), torch.randn(3, 6)
    torch.testing.assert_close(head(feature), layer(feature))
    assert head.config == {"features": 6, "classes": 4} and not head.weight.requires_grad


def test_a_damaged_head_raises(tmp_path):
    with pytest.raises(UserError, match="missing or damaged"):
        LinearHead.load(tmp_path)
    LinearHead.of(nn.Linear(6, 4)).save(tmp_path)
    (tmp_path / "head.json").write_text('{"features": 5, "classes": 4}')
    with pytest.raises(UserError, match="missing or damaged"):
        LinearHead.load(tmp_path)
