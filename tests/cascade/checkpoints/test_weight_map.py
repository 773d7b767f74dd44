from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cascade.checkpoints.weight_map import (
    Link,
    batch_norm,
    by_module,
    layer,
    same,
    to_ours,
    to_theirs,
)
from cascade.errors import UserError

FUSED = Link(("query", "key_value"), ("in_proj",), our_parts=(1, 2))
SPLIT = Link(("key_value",), ("key", "value"), their_parts=(1, 1))
ONES = Link(("gamma",), ("scale",), their_leading_ones=3)
CONV = Link(("linear",), ("conv",), their_trailing_ones=2)


def test_a_layer_is_weight_and_bias():
    state = {"a.weight": torch.randn(2, 3), "a.bias": torch.randn(2)}
    theirs = to_theirs(state, layer("a", "b.0"))
    assert list(theirs) == ["b.0.weight", "b.0.bias"]
    assert theirs["b.0.weight"] is state["a.weight"]


def test_a_batch_norm_is_all_five_tensors_or_three():
    assert len(list(batch_norm("a", "b"))) == 5
    names = [link.ours[0] for link in batch_norm("a", "b", affine=False)]
    assert names == ["a.running_mean", "a.running_var", "a.num_batches_tracked"]


def test_one_tensor_of_theirs_becomes_two_of_ours_and_back():
    theirs = {"in_proj": torch.randn(9, 4)}
    ours = to_ours(theirs, [FUSED])
    assert torch.equal(ours["query"], theirs["in_proj"][:3])
    assert torch.equal(ours["key_value"], theirs["in_proj"][3:])
    assert torch.equal(to_theirs(ours, [FUSED])["in_proj"], theirs["in_proj"])


def test_two_tensors_of_theirs_become_one_of_ours_and_back():
    theirs = {"key": torch.randn(3, 4), "value": torch.randn(3, 4)}
    ours = to_ours(theirs, [SPLIT])
    assert torch.equal(ours["key_value"], torch.cat([theirs["key"], theirs["value"]]))
    back = to_theirs(ours, [SPLIT])
    assert torch.equal(back["key"], theirs["key"]) and torch.equal(back["value"], theirs["value"])


def test_leading_axes_of_one_are_dropped_and_restored():
    theirs = {"scale": torch.randn(1, 1, 1, 5)}
    ours = to_ours(theirs, [ONES])
    assert ours["gamma"].shape == (5,)
    assert torch.equal(to_theirs(ours, [ONES])["scale"], theirs["scale"])


def test_trailing_axes_of_one_are_dropped_and_restored():
    theirs = {"conv": torch.randn(5, 3, 1, 1)}
    ours = to_ours(theirs, [CONV])
    assert torch.equal(ours["linear"], theirs["conv"][..., 0, 0])
    assert torch.equal(to_theirs(ours, [CONV])["conv"], theirs["conv"])


def test_tensors_follow_the_longest_path_that_leads_to_them():
    modules = {"a": "x.0", "a.b": "y", "a.b.c": "z.1"}
    links = by_module(["a.weight", "a.b.bias", "a.b.c.d.weight", "a.bb.weight"], modules)
    assert [link.theirs[0] for link in links] == [
        "x.0.weight",
        "y.bias",
        "z.1.d.weight",
        "x.0.bb.weight",
    ]
    with pytest.raises(AssertionError, match=r"q\.weight is in none"):
        list(by_module(["q.weight"], modules))


def test_parts_can_be_written_to_a_file(tmp_path):
    """safetensors refuses tensors that share their numbers; parts of one tensor don't."""
    ours = to_ours({"in_proj": torch.randn(9, 4)}, [FUSED])
    save_file(ours, tmp_path / "w.safetensors")
    assert torch.equal(load_file(tmp_path / "w.safetensors")["key_value"], ours["key_value"])


def test_the_first_five_missing_and_unexpected_tensors_are_named():
    table = [same(f"ours{i}", f"theirs{i}") for i in range(9)]
    state = {f"other{i}": torch.zeros(1) for i in range(7)} | {"theirs0": torch.zeros(1)}
    with pytest.raises(UserError) as caught:
        to_ours(state, table)
    message = str(caught.value)
    assert "8 missing: theirs1, theirs2, theirs3, theirs4, theirs5 and 3 more" in message
    assert "7 unexpected: other0, other1, other2, other3, other4 and 2 more" in message
    with pytest.raises(UserError, match="9 missing: ours0"):
        to_theirs(state, table)


@pytest.mark.parametrize(
    ("link", "state"),
    [
        (FUSED, {"in_proj": torch.zeros(8, 4)}),
        (SPLIT, {"key": torch.zeros(3, 4), "value": torch.zeros(3, 5)}),
        (ONES, {"scale": torch.zeros(5)}),
        (ONES, {"scale": torch.zeros(1, 2, 1, 5)}),
        (CONV, {"conv": torch.zeros(5, 3, 3, 3)}),
        (CONV, {"conv": torch.zeros(5)}),
    ],
)
def test_shapes_that_no_network_could_have_are_refused(link, state):
    with pytest.raises(UserError, match=f"misshapen: {next(iter(state))}"):
        to_ours(state, [link])


def test_shapes_are_held_against_the_network():
    network = nn.Linear(4, 3)
    table = [same("weight", "w"), same("bias", "b")]
    wrong = {"w": torch.zeros(3, 5), "b": torch.zeros(3)}
    with pytest.raises(UserError, match=r"1 misshapen: w \(3x5 instead of 3x4\)"):
        to_ours(wrong, table, network)
    with pytest.raises(UserError, match=r"1 misshapen: bias \(scalar instead of 3\)"):
        to_theirs({"weight": torch.zeros(3, 4), "bias": torch.zeros(())}, table, network)
    right = {"w": torch.zeros(3, 4), "b": torch.zeros(3)}
    assert to_ours(right, table, network).keys() == network.state_dict().keys()


def test_a_table_that_misses_a_tensor_of_the_network_is_our_mistake():
    with pytest.raises(UserError, match="unexpected: bias"):
        to_ours({"w": torch.zeros(3, 4)}, [same("weight", "w")], nn.Linear(4, 3))


def test_a_table_that_names_a_tensor_twice_is_our_mistake():
    with pytest.raises(AssertionError, match="twice"):
        to_theirs({"a": torch.zeros(1)}, [same("a", "b"), same("a", "c")])
