"""Decides, node by node, what computes in half precision and why the rest does not.

A node keeps its type for the first reason that holds: the user wants it, its definition, what is
known of its operator, where its numbers come from, its constants, the numbers of a run. Products
and what is in half precision already are half precision; all other nodes follow their neighbours,
so that as few values as possible are cast (``cut``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.gate import LEFT_OUT
from optimizer.precision.constants import Numbers
from optimizer.precision.cut import divide
from optimizer.precision.limits import FLOATS, Format
from optimizer.precision.masks import overflowing, reached
from optimizer.precision.origins import cast_integers, from_integers, widened
from optimizer.precision.ranges import Ranges
from optimizer.precision.retyping import Retyper, Retyping
from optimizer.precision.rules import is_product, kept_by_rule, sensitive_input
from optimizer.raising.base import site
from optimizer.raising.shapes import Shapes
from optimizer.widening import EXACT

#: Stand for whatever is outside of the graph and has the types of before, or half precision.
_OUTSIDE, _OUTSIDE_HALF = "outside", "outside, half"


@dataclass(frozen=True)
class Kept:
    """Why a node or value keeps its type.

    Attributes:
        reason: As a sentence fragment a user understands.
        maximum, limit: The number seen and the one it should not exceed, where that is why.
    """

    reason: str
    maximum: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Evidence:
    """What is known besides the graph.

    Attributes:
        protected: Nodes to be left alone, and why.
        numbers: Of every constant that would be converted, by name.
        fitted: Names of constants that will be made to fit.
        masks: Values that may use the whole range of the format, because they are masks.
        ranges: Numbers of a run; None = none was made.
        margin: Share of the format's largest number that values seen may reach.
    """

    protected: Mapping[ir.Node, str]
    numbers: Mapping[str, Numbers]
    fitted: frozenset[str] = frozenset()
    masks: frozenset[ir.Value] = frozenset()
    ranges: Ranges | None = None
    margin: float = 1.0


@dataclass(frozen=True)
class Plan:
    """What becomes of each node.

    Attributes:
        kept: Nodes with floating numbers that keep their types, and why.
        retyping: Nodes that compute in half precision from now on, and what of them changes.
        interface: Graph inputs and outputs that become half precision.
        refused: Graph inputs and outputs that should have, and why they do not.
    """

    kept: Mapping[ir.Node, Kept]
    retyping: Mapping[ir.Node, Retyping]
    interface: tuple[ir.Value, ...]
    refused: Mapping[ir.Value, Kept]

    def without(self, allow: Callable[[str], bool]) -> Plan:
        """The plan without what is not allowed, asked by name and in order.

        Any part of a plan is a plan: where kinds meet, a cast is written.
        """
        left_out = {n: Kept(LEFT_OUT) for n in self.retyping if not allow(site(n))}
        retyping = {n: change for n, change in self.retyping.items() if n not in left_out}
        interface = [value for value in self.interface if allow(str(value.name))]
        refused = {v: Kept(LEFT_OUT) for v in self.interface if v not in interface}
        return Plan(
            {**self.kept, **left_out}, retyping, tuple(interface), {**self.refused, **refused}
        )


class Planner:
    """Makes the plan of one model."""

    def __init__(
        self, model: ir.Model, format_: Format, retyper: Retyper, evidence: Evidence
    ) -> None:
        self._graph, self._format, self._evidence = model.graph, format_, evidence
        self._retyping = {node: retyper.of(node) for node in model.graph if not is_cast(node)}
        self._shapes = Shapes()
        self._integers = from_integers(model.graph)
        self._widened = widened(model.graph)
        self._unfit = dict(self._unfit_values())

    def plan(self, wanted: Sequence[ir.Value]) -> Plan:
        """Decide for all nodes.

        Args:
            wanted: Graph inputs and outputs that are to become half precision.
        """
        refused = self._refused(wanted)
        interface = frozenset(wanted) - refused.keys()
        kept: dict[ir.Node, Kept] = {}
        fixed: dict[ir.Node | str, bool] = {_OUTSIDE: False, _OUTSIDE_HALF: True}
        for node in self._graph:
            reason = self._reason(node)
            if reason is not None:
                kept[node], fixed[node] = reason, False
            elif is_product(node) or self._is_half(node):
                fixed[node] = True
            elif self._retyping.get(node) == Retyping() and self._touches_source(node):
                fixed[node] = False  # an attribute, or its definition, says the type
        kinds = divide(fixed, list(self._values(interface)))
        retyping: dict[ir.Node, Retyping] = {}
        for node, change in self._retyping.items():
            if isinstance(change, str) or change == Retyping():
                continue
            if kinds.get(node, True):
                retyping[node] = change
            elif change.outputs:
                kept.setdefault(node, Kept("it lies between nodes that keep their types"))
        order = {node: kept[node] for node in self._graph if node in kept}
        return Plan(order, retyping, tuple(v for v in wanted if v in interface), refused)

    def _refused(self, wanted: Sequence[ir.Value]) -> dict[ir.Value, Kept]:
        """Graph inputs and outputs that cannot be half precision."""
        refused = {value: self._unfit[value] for value in wanted if value in self._unfit}
        caches = [value for value in wanted if is_cache(value)]
        misfit = next((value for value in caches if value in refused), None)
        if misfit is None:
            return refused
        # What is returned as present comes back as past.
        whole = Kept(f"the cache stays of one type, and {refused[misfit].reason}")
        return {**dict.fromkeys(caches, whole), **refused}

    # Reasons.

    def _reason(self, node: ir.Node) -> Kept | None:
        """Why a node keeps its types; None for one without, or that may change them."""
        change = self._retyping.get(node)
        if change is None or change == Retyping():
            return None
        if node in self._evidence.protected:
            return Kept(self._evidence.protected[node])
        if isinstance(change, str):
            return Kept(change) if self._touches_source(node) else None
        measured = self._evidence.ranges is not None
        text = self._origin(node, change) or kept_by_rule(
            node, self._format, self._shapes, measured=measured
        )
        text = text or self._constant(node, change)
        return Kept(text) if text is not None else self._measured(node, change)

    def _touches_source(self, node: ir.Node) -> bool:
        values = (v for v in (*node.inputs, *node.outputs) if v is not None)
        return any(value.dtype in self._format.sources for value in values)

    def _origin(self, node: ir.Node, change: Retyping) -> str | None:
        if node.op_type in EXACT and node.domain == "":
            return None
        if any(node.outputs[index] in self._integers for index in change.outputs):
            return "it computes with integers alone, such as positions and masks"
        if any(node.inputs[index] in self._widened for index in change.inputs):
            return "the model itself widens its input to float32"
        return None

    def _constant(self, node: ir.Node, change: Retyping) -> str | None:
        for index in sorted(change.inputs):
            value = node.inputs[index]
            numbers = None if value is None else self._evidence.numbers.get(str(value.name))
            if value is not None and numbers is not None:
                fault = numbers.fault(str(value.name), self._format)
                if fault is not None and str(value.name) not in self._evidence.fitted:
                    return fault
        return None

    def _measured(self, node: ir.Node, change: Retyping) -> Kept | None:
        for index in sorted(change.outputs):
            if node.outputs[index] in self._unfit:
                return self._unfit[node.outputs[index]]
        for index in sorted(change.inputs):
            value = node.inputs[index]
            if value is not None and value in self._unfit:
                return self._unfit[value]
        ranges = self._evidence.ranges
        if ranges is None:
            return None
        sensitive = [sensitive_input(node), *self._read_sensitively(node, change)]
        for value in sensitive:
            smallest = None if value is None else ranges.smallest.get(str(value.name))
            if value is not None and smallest is not None and smallest < self._format.tiny:
                return Kept(
                    f"'{value.name}' falls to {smallest:.3g} and is divided by or the like; "
                    f"{self._format.name} is precise from {self._format.tiny:.2g} on",
                    smallest,
                    self._format.tiny,
                )
        return self._inside(node, ranges)

    def _read_sensitively(self, node: ir.Node, change: Retyping) -> Iterator[ir.Value]:
        for index in sorted(change.outputs):
            value = node.outputs[index]
            if any(sensitive_input(user) is value for user, _ in value.uses()):
                yield value

    def _inside(self, node: ir.Node, ranges: Ranges) -> Kept | None:
        found = ranges.inside.get(str(node.outputs[0].name))
        if found is None or not self._format.overflows or found <= self._format.largest:
            return None
        return Kept(
            f"sums inside can reach {found:.4g}, {self._format.name} ends at "
            f"{self._format.largest:.6g}",
            found,
            self._format.largest,
        )

    def _unfit_values(self) -> Iterator[tuple[ir.Value, Kept]]:
        """Values that cannot be half precision, by the numbers seen or stored."""
        yield from self._overflowing()
        ranges = self._evidence.ranges
        if ranges is None:
            if self._format.overflows:
                unknown = Kept("it reads integers, and there is no data to tell how large they are")
                yield from ((value, unknown) for value in cast_integers(self._graph))
            return
        name, largest, tiny = self._format.name, self._format.largest, self._format.tiny
        for value in graph_values(self._graph):
            found = ranges.largest.get(str(value.name), 0.0)
            share = 1.0 if value in self._evidence.masks else self._evidence.margin
            if value.dtype == self._format.dtype:
                continue
            if found > share * largest:
                where = f"'{value.name}' reaches {found:.4g} on the calibration data"
                limit = f"the limit is {share * largest:.6g}, {share:g} of what {name} holds"
                yield value, Kept(f"{where}; {limit}", found, share * largest)
            elif 0 < found < tiny:
                where = f"'{value.name}' stays below {found:.3g} on the calibration data"
                yield value, Kept(f"{where}; {name} is precise from {tiny:.2g} on", found, tiny)

    def _overflowing(self) -> Iterator[tuple[ir.Value, Kept]]:
        """Values that may hold a stored number which does not fit, whether a run shows it or not.

        What is computed from such numbers is judged by the run, if there is one.
        """
        measured = self._evidence.ranges is not None
        for source, numbers in overflowing(self._graph, self._evidence.numbers, self._format):
            if str(source.name) not in self._evidence.fitted:
                reason = numbers.fault(str(source.name), self._format)
                for value in reached(self._graph, source, selected=measured):
                    yield value, Kept(f"it may get the numbers of a constant: {reason}")

    # What the cut is about.

    def _is_half(self, node: ir.Node) -> bool:
        if is_cast(node):
            return False
        values = (v for v in (*node.inputs, *node.outputs) if v is not None)
        return any(value.dtype == self._format.dtype for value in values)

    def _values(
        self, interface: frozenset[ir.Value]
    ) -> Iterator[tuple[ir.Node | str, list[ir.Node | str]]]:
        """Who computes and who reads each floating value."""
        half = self._format.dtype
        for value in graph_values(self._graph):
            if value.dtype not in FLOATS or graphs.constant(value) is not None:
                continue
            outside = _OUTSIDE_HALF if value in interface or value.dtype == half else _OUTSIDE
            readers: list[ir.Node | str] = []
            for node, index in value.uses():
                if node.graph is not self._graph:
                    readers.append(outside if value.dtype == half else _OUTSIDE)
                elif not (is_cast(node) and not is_float_cast(node)) and self._reads(node, index):
                    readers.append(node)
            if value.is_graph_output():
                readers.append(outside)
            producer = value.producer()
            yield (outside if producer is None else producer), readers

    def _reads(self, node: ir.Node, index: int) -> bool:
        """Whether an input has the type of the node; a Resize reads scales in float32 always."""
        change = self._retyping.get(node)
        return not isinstance(change, Retyping) or change == Retyping() or index in change.inputs


def graph_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Inputs and results of nodes, in order."""
    yield from graph.inputs
    for node in graph:
        yield from (value for value in node.outputs if value.name)


def is_cast(node: ir.Node) -> bool:
    """Whether a node is a Cast."""
    return node.op_type == "Cast" and node.domain == ""


def is_float_cast(node: ir.Node) -> bool:
    """Whether it is one from a type that a conversion may change to another."""
    source = node.inputs[0]
    return source is not None and source.dtype in FLOATS and node.outputs[0].dtype in FLOATS


def is_cache(value: ir.Value) -> bool:
    """Whether a graph input or output holds past keys or values."""
    named = str(value.name).startswith(("past", "present"))
    return named and value.shape is not None and len(value.shape) == 4
