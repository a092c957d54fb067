"""The order of a program's steps: generated loops side by side, so that one function holds them.

Inductor writes neighbouring loop nests into one function, and begins another behind every call. Each function is a call
from Python and a team of threads to wake: some microseconds, of which a decode step has few. So where the order is
free, calls that are ready go first and generated steps wait for the next one.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch._inductor.scheduler import (
    BaseSchedulerNode,
    FusedSchedulerNode,
    NopKernelSchedulerNode,
    SchedulerNode,
)

from lowering import versions
from lowering.session import session

Nodes = list[BaseSchedulerNode]
#: How many bytes more at the peak of memory an order may take: what the L2 of a core holds costs next to nothing.
SLACK = 1 << 20


def install() -> None:
    """In our sessions, group the steps of a graph for the CPU once Inductor has ordered them."""
    versions.after_ordering(regrouped)


def regrouped(nodes: Nodes, peak: Callable[[Nodes], int]) -> Nodes:
    """``nodes``, or the same in an order with fewer functions. ``peak``: bytes in use at most, in an order."""
    if session() is None or any((device := node.get_device()) and device.type != "cpu" for node in nodes):
        return nodes
    found = grouped(nodes)
    fewer = functions(found) < functions(nodes)
    return found if fewer and peak(found) <= peak(nodes) + SLACK else nodes


def grouped(nodes: Sequence[BaseSchedulerNode]) -> Nodes:
    """The steps in an order that follows each one by a ready step of its kind, where there is one."""
    maker = {name: i for i, node in enumerate(nodes) for name in node.get_buffer_names()}
    needs = [
        {maker[dep.name] for dep in node.unmet_dependencies if dep.name in maker} - {i} for i, node in enumerate(nodes)
    ]
    users: list[list[int]] = [[] for _ in nodes]
    for i, before in enumerate(needs):
        for each in before:
            users[each].append(i)
    ready: dict[bool, list[int]] = {True: [], False: []}
    for i, before in enumerate(needs):
        if not before:
            heapq.heappush(ready[is_generated(nodes[i])], i)
    order: Nodes = []
    kind = False
    while ready[True] or ready[False]:
        kind = kind if ready[kind] else not kind
        i = heapq.heappop(ready[kind])
        order.append(nodes[i])
        for user in users[i]:
            needs[user].discard(i)
            if not needs[user]:
                heapq.heappush(ready[is_generated(nodes[user])], user)
    return order


def functions(nodes: Sequence[BaseSchedulerNode]) -> int:
    """How many generated functions an order takes. What generates nothing ends none."""
    kinds = [is_generated(node) for node in nodes if not isinstance(node, NopKernelSchedulerNode)]
    return sum(kind and not before for before, kind in pairwise([False, *kinds]))


def is_generated(node: BaseSchedulerNode) -> bool:
    return isinstance(node, (SchedulerNode, FusedSchedulerNode)) and not node.is_template()
