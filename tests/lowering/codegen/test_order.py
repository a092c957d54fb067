"""Calls go first where they can, so that generated loops share a function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowering import registration
from lowering.codegen import order
from lowering.settings import Settings

#: A step: whether it is generated, and which of the steps before it it needs.
Steps = list[tuple[bool, list[int]]]


@pytest.fixture(autouse=True)
def _kind_of_stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "is_generated", lambda node: node.generated)


@pytest.fixture
def _in_a_session() -> Iterator[None]:
    with registration.entered(Settings()):
        yield


def nodes_of(steps: Steps, device: str = "cpu") -> list[Any]:
    return [
        SimpleNamespace(
            at=i,
            generated=generated,
            get_buffer_names=lambda i=i: [f"buf{i}"],
            unmet_dependencies=[SimpleNamespace(name=f"buf{j}") for j in [*needs, i]],  # and itself, as in-place writes
            get_device=lambda: torch.device(device),
        )
        for i, (generated, needs) in enumerate(steps)
    ]


def places(nodes: Sequence[Any]) -> list[int]:
    return [node.at for node in nodes]


@st.composite
def programs(draw: st.DrawFn) -> Steps:
    count = draw(st.integers(0, 12))
    return [(draw(st.booleans()), draw(st.lists(st.integers(0, i - 1), max_size=3)) if i else []) for i in range(count)]


@given(programs())
def test_every_step_is_there_once_and_after_what_it_needs(steps: Steps) -> None:
    found = places(order.grouped(nodes_of(steps)))
    assert sorted(found) == list(range(len(steps)))
    at = {step: i for i, step in enumerate(found)}
    assert all(at[need] < at[i] for i, (_, needs) in enumerate(steps) for need in needs)


#: Two products of one input, each followed by generated work that a last call needs.
TWO_CHAINS: Steps = [(True, []), (False, [0]), (True, [1]), (False, [0]), (True, [3]), (False, [2, 4])]


@pytest.mark.usefixtures("_in_a_session")
def test_work_on_the_results_of_two_calls_shares_a_function() -> None:
    nodes = nodes_of(TWO_CHAINS)
    found = order.regrouped(nodes, lambda _: 0)
    assert places(found) == [0, 1, 3, 2, 4, 5]
    assert (order.functions(nodes), order.functions(found)) == (3, 2)


@pytest.mark.usefixtures("_in_a_session")
def test_an_order_stays_that_takes_less_memory_or_is_no_worse() -> None:
    nodes = nodes_of(TWO_CHAINS)
    assert order.regrouped(nodes, lambda given: 0 if given is nodes else order.SLACK + 1) is nodes
    assert order.regrouped(nodes, lambda given: 0 if given is nodes else order.SLACK) is not nodes
    chain = nodes_of([(True, []), (False, [0]), (True, [1])])
    assert order.regrouped(chain, lambda _: 0) is chain


def test_compilations_of_others_and_other_devices_keep_their_order() -> None:
    nodes = nodes_of(TWO_CHAINS)
    assert order.regrouped(nodes, lambda _: 0) is nodes
    with registration.entered(Settings()):
        elsewhere = nodes_of(TWO_CHAINS, device="meta")
        assert order.regrouped(elsewhere, lambda _: 0) is elsewhere
