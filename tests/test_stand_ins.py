# SPDX-License-Identifier: Apache-2.0
"""Stand-ins hand on and hand out streams in the form of the blocks that they take the place of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimum_blockprune.stand_ins import Bypass, Form, Replay, hidden_of, incoming_hidden, learn_form, map_tensors


PLAIN = Form(Tensor, 0, {})


def tensors(count: int) -> list[Tensor]:
    return [torch.full((1, 2, 3), float(number)) for number in range(count)]


def test_the_form_of_a_single_tensor() -> None:
    first, second = tensors(2)
    assert learn_form([first, second], [((first,), {}), ((first,), {})]) == PLAIN


@pytest.mark.parametrize("kind", [tuple, list])
def test_the_form_of_a_tuple_that_nobody_reads(kind: type) -> None:
    hidden, weights = tensors(2)
    outputs = [kind((hidden, weights)), kind((hidden, None))]
    assert learn_form(outputs, [((hidden,), {}), ((hidden,), {"mask": None})]) == Form(kind, 2, {})


def test_a_second_stream_is_known_by_its_identity() -> None:
    hidden, bias, state, mask = tensors(4)
    # A position by number, another by name; the mask has the values of no part, and `True` is no stream.
    outputs = [(hidden, bias, state, True), (hidden, bias, state, True), (hidden, None, None, True)]
    arguments: list[Any] = [
        ((hidden,), {"mask": mask}),
        ((hidden, bias), {"router": state, "mask": mask, "flag": True}),
        ((hidden, bias), {"router": state, "mask": mask, "flag": True}),
    ]
    assert learn_form(outputs, arguments) == Form(tuple, 4, {1: 1, 2: "router"})
    # Equal values are not the same stream.
    arguments[1] = arguments[2] = ((hidden, bias.clone()), {"router": state.clone()})
    assert learn_form(outputs, arguments) == Form(tuple, 4, {})


def test_a_stream_that_begins_after_the_first_block() -> None:
    hidden, bias = tensors(2)
    outputs = [(hidden, None), (hidden, bias), (hidden, bias)]
    arguments = [((hidden,), {"bias": None})] * 2 + [((hidden,), {"bias": bias})]
    assert learn_form(outputs, arguments) == Form(tuple, 2, {1: "bias"})
    assert learn_form(outputs[:1], arguments[:1]) == Form(tuple, 2, {})


def test_a_bypass_hands_on_what_comes_in() -> None:
    hidden, bias, state = tensors(3)
    block = nn.Linear(3, 3)
    out = Bypass(block, PLAIN)(hidden)
    assert torch.equal(out, hidden)
    assert out is not hidden, "the model may change it in place"
    out = Bypass(block, Form(tuple, 4, {1: 1, 3: "state"}))(hidden, bias, state=state)
    assert isinstance(out, tuple) and torch.equal(out[0], hidden)
    assert out[1] is bias and out[2] is None and out[3] is state
    # What is not given is not made up.
    assert Bypass(block, Form(list, 3, {1: 5, 2: "state"}))(hidden_states=hidden)[1:] == [None, None]


def test_a_replay_returns_copies_of_what_is_stored() -> None:
    hidden, bias = tensors(2)
    replay = Replay(nn.Linear(3, 3), (hidden, [bias, None]))
    out = replay(torch.zeros(1), anything=1)
    assert torch.equal(out[0], hidden) and torch.equal(out[1][0], bias) and out[1][1] is None
    out[0].add_(1)
    assert torch.equal(replay()[0], hidden)


@pytest.mark.parametrize("stand_in", [Bypass(nn.Linear(3, 3), PLAIN), Replay(nn.Linear(3, 3), None)])
def test_a_stand_in_answers_for_its_block_and_shows_none_of_its_weights(stand_in: nn.Module) -> None:
    assert stand_in.in_features == 3
    assert not list(stand_in.parameters()) and not stand_in.state_dict() and len(list(stand_in.modules())) == 1
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = stand_in.no_such_thing


def test_where_the_hidden_states_are() -> None:
    hidden, other = tensors(2)
    assert incoming_hidden((hidden, other), {}) is incoming_hidden((), {"hidden_states": hidden}) is hidden
    assert hidden_of(hidden) is hidden_of((hidden, other)) is hidden_of([hidden]) is hidden


def test_map_tensors_keeps_the_nesting() -> None:
    one, two = tensors(2)
    mapped = map_tensors((one, [two, None], "text", 3), lambda tensor: tensor + 1)
    assert type(mapped) is tuple and type(mapped[1]) is list
    assert torch.equal(mapped[0], one + 1) and torch.equal(mapped[1][0], two + 1)
    assert mapped[1][1:] == [None] and mapped[2:] == ("text", 3)
