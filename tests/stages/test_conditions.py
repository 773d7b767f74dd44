from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from stages.conditions import concat
from stages.stage_c import StageCCondition


@dataclass(frozen=True)
class Condition:
    tokens: Tensor
    image: Tensor | None = None
    size: int = 3


def test_conditions_are_joined_along_the_batch_field_by_field():
    first = Condition(torch.zeros(1, 5, 2), torch.zeros(1, 4))
    second = Condition(torch.ones(2, 5, 2), torch.ones(2, 4))
    joined = concat([first, second])
    assert isinstance(joined, Condition)
    assert joined.tokens.shape == (3, 5, 2) and joined.tokens[:, 0, 0].tolist() == [0, 1, 1]
    assert joined.image is not None and joined.image[:, 0].tolist() == [0, 1, 1]
    assert joined.size == 3


def test_what_none_of_them_has_stays_none():
    cond = StageCCondition(torch.zeros(1, 5, 2), torch.zeros(1, 3))
    joined = concat([cond, cond])
    assert joined.text_hidden.shape == (2, 5, 2)
    assert joined.image is None and joined.sca is None and joined.crp is None


def test_a_field_that_only_some_have_is_refused_by_name():
    first = Condition(torch.zeros(1, 5, 2), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="image is given in some"):
        concat([first, Condition(torch.zeros(1, 5, 2))])
    with pytest.raises(ValueError, match="image is given in some"):
        concat([Condition(torch.zeros(1, 5, 2)), first])


def test_maps_for_the_blocks_of_a_network_are_joined_one_by_one():
    text = torch.zeros(1, 5, 2), torch.zeros(1, 3)
    first = StageCCondition(*text, control=(torch.zeros(1, 4, 2, 2), None))
    second = StageCCondition(*text, control=(torch.ones(1, 4, 2, 2), None))
    joined = concat([first, second]).control
    assert joined is not None and joined[1] is None
    assert joined[0] is not None and joined[0][:, 0, 0, 0].tolist() == [0, 1]
    with pytest.raises(ValueError, match="control is given in some"):
        concat([first, StageCCondition(*text)])
    with pytest.raises(ValueError, match=r"control\[1\] is given in some"):
        concat([first, StageCCondition(*text, control=(torch.zeros(1, 4, 2, 2),) * 2)])
    with pytest.raises(ValueError, match="control has 1 entries"):
        concat([first, StageCCondition(*text, control=(None,))])
