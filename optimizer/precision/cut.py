"""Divides nodes into two kinds so that as few values as possible cross from one to the other.

Some nodes are of a fixed kind, the others are free. A value costs 1 where it is computed by one
kind and read by the other, however many nodes read it: it is cast once. The cheapest division is a
minimum cut, found as a maximum flow (Ford and Fulkerson 1956; shortest paths first: Edmonds and
Karp 1972). Of several cheapest ones, that with the fewest nodes on the side of the source is taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)

_SOURCE, _SINK = 0, 1
_MANY = 1 << 30


class _Network:
    """A flow network; edge ``i ^ 1`` is the reverse of edge ``i``."""

    def __init__(self) -> None:
        self._heads: list[int] = []
        self._left: list[int] = []
        self._edges: list[list[int]] = [[], []]

    def vertex(self) -> int:
        self._edges.append([])
        return len(self._edges) - 1

    def connect(self, tail: int, head: int, capacity: int) -> None:
        for a, b, room in ((tail, head, capacity), (head, tail, 0)):
            self._edges[a].append(len(self._heads))
            self._heads.append(b)
            self._left.append(room)

    def saturate(self) -> set[int]:
        """Send as much as possible; returns what the source still reaches."""
        while True:
            came = self._search()
            if _SINK not in came:
                return set(came)
            vertex = _SINK
            while vertex != _SOURCE:
                edge = came[vertex]
                self._left[edge] -= 1
                self._left[edge ^ 1] += 1
                vertex = self._heads[edge ^ 1]

    def _search(self) -> dict[int, int]:
        """The edge over which each vertex is first reached from the source."""
        came = {_SOURCE: -1}
        pending = deque([_SOURCE])
        while pending and _SINK not in came:
            for edge in self._edges[pending.popleft()]:
                head = self._heads[edge]
                if self._left[edge] and head not in came:
                    came[head] = edge
                    pending.append(head)
        return came


def divide(
    fixed: Mapping[KeyT, bool], values: Sequence[tuple[KeyT, Iterable[KeyT]]]
) -> dict[KeyT, bool]:
    """The kind of every node.

    Args:
        fixed: Nodes whose kind is given.
        values: Who computes each value, and who reads it.

    Returns:
        For every node named: True, or False for those that are better off with the False ones.
    """
    network = _Network()
    vertices: dict[KeyT, int] = {k: _SINK if kind else _SOURCE for k, kind in fixed.items()}

    def vertex(key: KeyT) -> int:
        if key not in vertices:
            vertices[key] = network.vertex()
        return vertices[key]

    for producer, readers in values:
        start, ends = vertex(producer), {vertex(reader) for reader in readers} - {vertex(producer)}
        if not ends:
            continue
        # Any reader on the sink's side pulls ``before`` over, any on the source's side ``after``.
        before, after = network.vertex(), network.vertex()
        network.connect(start, before, 1)
        network.connect(after, start, 1)
        for end in ends:
            network.connect(before, end, _MANY)
            network.connect(end, after, _MANY)
    reached = network.saturate()
    return {key: number not in reached for key, number in vertices.items()}
