"""Who reads the tokens after some were merged, and what each reader needs.

Starting at the places where tokens are merged, values are followed that still hold one row per
token, through everything that treats each token by itself, also where tokens at the ends are cut
off and where other tokens are joined to them: a text that goes with an image. What is reached
otherwise is a reader: it takes tokens at constant positions out, which are protected, or needs
every token and is given them back. (The mean over tokens given back is the mean weighted by their
sizes.)

A merged token is at the position of the token that the others went into. Tables with one row per
position (rotary embeddings, learned positions, masks) are read there.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import optional
from optimizer.raising.dims import Dim, Shape
from optimizer.raising.shapes import Shapes

_ELEMENTWISE = frozenset(
    {
        "Abs", "Add", "Cast", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid",
        "HardSwish", "Identity", "LeakyRelu", "Max", "Min", "Mish", "Mul", "Neg", "Pow", "Relu",
        "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh",
    }
)  # fmt: skip
_BY_TOKEN = frozenset({"LayerNormalization", "RMSNormalization", "Softmax", "LogSoftmax"})
_ATTENDING = frozenset({"Attention", "GroupQueryAttention", "MultiHeadAttention"})
#: Inputs of Attention.
MASK = 3


class Need(enum.Enum):
    """What a reader does with the tokens.

    SELECT: takes tokens at constant positions out.
    ALL: anything else.
    """

    SELECT = "selects tokens"
    ALL = "needs every token"


@dataclass(frozen=True)
class Rows:
    """Which rows a value [B, rows, D] has.

    Attributes:
        stage: How many reductions lie before.
        skip, cut: How many protected tokens were taken off in front and behind.
        before, behind: Values [B, n, D] whose rows stand in front and behind.
    """

    stage: int
    skip: int = 0
    cut: int = 0
    before: tuple[ir.Value, ...] = ()
    behind: tuple[ir.Value, ...] = ()

    @property
    def joined(self) -> bool:
        """Whether other rows stand beside the tokens."""
        return bool(self.before or self.behind)


@dataclass(frozen=True)
class Reader:
    """One input of a node that reads tokens and is not computed token by token.

    Attributes:
        value: The tokens.
        node: Who reads them; None: they are an output of the model.
        need: What for.
        rows: Those of ``value``.
        positions: Of the tokens that are taken out, for SELECT.
    """

    value: ir.Value
    node: ir.Node | None
    need: Need
    rows: Rows
    positions: tuple[int, ...] = ()

    @property
    def stage(self) -> int:
        """How many reductions lie before."""
        return self.rows.stage


@dataclass(frozen=True)
class Table:
    """Input ``index`` of ``node`` has one row per position of the original ``rows``."""

    node: ir.Node
    index: int
    rows: Rows


@dataclass(frozen=True)
class Attend:
    """An Attention outside of the tower whose queries or keys are tokens; None: they are others."""

    node: ir.Node
    queries: Rows | None
    keys: Rows | None


@dataclass(frozen=True)
class Keeps:
    """What a way to choose tokens keeps.

    Attributes:
        ordered: What is left keeps its order.
        placed: Each token that is left is one of the original ones, which others went into.
    """

    ordered: bool = False
    placed: bool = True


@dataclass
class Flow:
    """Where tokens go.

    Attributes:
        rows: Values that hold one row per token.
        readers: Nodes in graph order, then outputs.
        entered: The rows of each value that is reduced, before that.
        tables: What is read by position, in graph order.
        attends: Attentions outside of the tower, in graph order.
        lost: Where attention cannot read joined tokens, with the reason; None where all do.
        captured: A node inside of a branch or loop that reads tokens, or None.
    """

    rows: dict[ir.Value, Rows] = field(default_factory=dict)
    readers: list[Reader] = field(default_factory=list)
    entered: dict[ir.Value, Rows | None] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    attends: list[Attend] = field(default_factory=list)
    lost: str | None = None
    captured: ir.Node | None = None


@dataclass
class Walk:
    """How tokens are followed.

    Attributes:
        shapes: Of the graph.
        attentions: Nodes of the tower, which attend to merged tokens correctly.
        count: Tokens that enter the tower.
        protected: Positions that are.
        keeps: What the reduction keeps.
        join: Whether other tokens may be joined to them.
        outside: Whether attentions outside of the tower may read them.
    """

    shapes: Shapes
    attentions: Set[ir.Node]
    count: int
    protected: Set[int]
    keeps: Keeps
    join: bool = True
    outside: bool = True
    flow: Flow = field(default_factory=Flow)
    _behind_joins: set[ir.Value] = field(default_factory=set)

    def follow(self, graph: ir.Graph, reduced: Sequence[ir.Value]) -> Flow:
        """Follow the tokens behind the first reduction.

        Args:
            graph: The main graph.
            reduced: Values [B, N, D] whose users read fewer tokens from now on, in graph order;
                the users of the first are in stage 1.
        """
        flow = self.flow
        begins = {value: Rows(index + 1) for index, value in enumerate(reduced)}
        outputs = set(graph.outputs)
        for node in graph:
            carried = [v for v in node.inputs if v is not None and v in flow.rows]
            if carried:
                self._visit(node, carried)
            self._note_lost(node)
            for output in node.outputs:
                rows = flow.rows.get(output)
                if output in outputs and rows is not None:
                    flow.readers.append(Reader(output, None, Need.ALL, rows))
                if output in begins:
                    flow.entered[output], flow.rows[output] = rows, begins[output]
                if output in flow.rows:
                    inside = (
                        use.node for use in output.uses() if use.node.graph not in (graph, None)
                    )
                    flow.captured = flow.captured or next(inside, None)
        flow.readers.sort(key=lambda reader: reader.node is None)
        return flow

    def _note_lost(self, node: ir.Node) -> None:
        """Attentions behind a join must read joined tokens, or tokens are given back before it."""
        if not any(value in self._behind_joins for value in node.inputs):
            return
        self._behind_joins.update(node.outputs)
        reads = any(attend.node is node for attend in self.flow.attends)
        if self.flow.lost is None and node.op_type in _ATTENDING and not reads:
            self.flow.lost = self._why_not(node)

    def _why_not(self, node: ir.Node) -> str:
        if _is_cached(node):
            return "its keys and values are cached"
        if node.attributes.get_int("is_causal", 0) and not self.keeps.ordered:
            return "it is causal, and the order of the tokens is not kept"
        if not self.keeps.placed:
            return "its positions or mask go by token, and several have become one"
        return f"'{node.name}' reads them in another form"

    def _visit(self, node: ir.Node, carried: list[ir.Value]) -> None:
        inside = node in self.attentions or not self.outside
        if node.op_type == "Attention" and node.domain == "" and not inside and self._attends(node):
            return
        distinct = {self.flow.rows[value] for value in carried}
        rows = self._through(node, carried, distinct.pop()) if len(distinct) == 1 else None
        if rows is not None:
            self.flow.rows[node.outputs[0]] = rows
            return
        for value in dict.fromkeys(carried):
            self.flow.readers.append(self._reader(node, value))

    def _through(self, node: ir.Node, carried: list[ir.Value], rows: Rows) -> Rows | None:
        """The rows of what ``node`` computes token by token; None where it does not."""
        if node in self.attentions:
            return rows if all(value in carried for value in node.inputs[:3]) else None
        if node.domain != "":
            return None
        if node.op_type == "Concat":
            return self._joined(node, carried, rows)
        if node.op_type == "Slice":
            return self._trimmed(node, rows)
        if node.op_type in _BY_TOKEN:
            axis = node.attributes.get_int("axis", -1)
            return rows if node.inputs[0] in carried and axis in (-1, 2) else None
        if node.op_type == "MatMul":
            tensor = graphs.constant(node.inputs[1])
            return rows if tensor is not None and len(tensor.shape) == 2 else None
        if node.op_type in _ELEMENTWISE or node.op_type == "RotaryEmbedding":
            return rows if self._by_position(node, carried, rows) else None
        return None

    def _by_position(self, node: ir.Node, carried: list[ir.Value], rows: Rows) -> bool:
        """Whether all other operands are the same for all tokens, or tables by position."""
        tables = []
        for index, value in enumerate(node.inputs):
            if value is None or value in carried:
                continue
            shape = self.shapes.of(value)
            rotary = node.op_type == "RotaryEmbedding"
            if not rotary and _same_for_all_tokens(shape):
                continue
            if not self.keeps.placed or not _has_rows(shape, self._size(carried[0])):
                return False
            # A row per token that is another for each image is no table: it is data.
            if index not in (1, 2) if rotary else not _is_table(shape):
                return False
            tables.append(Table(node, index, rows))
        self.flow.tables.extend(tables)
        return True

    def _size(self, value: ir.Value | None) -> Dim | None:
        shape = self.shapes.of(value)
        return shape[1] if shape is not None and len(shape) == 3 else None

    def _joined(self, node: ir.Node, carried: list[ir.Value], rows: Rows) -> Rows | None:
        values = [value for value in node.inputs if value is not None]
        along = node.attributes.get_int("axis", 0) in (1, -2)
        if not along or len(carried) != 1 or self._size(node.outputs[0]) is None:
            return None
        at = values.index(carried[0])
        before, behind = tuple(values[:at]), tuple(values[at + 1 :])
        sizes = [[self._size(value) for value in part] for part in (before, behind)]
        if sizes == [[n] if n else [] for n in (rows.skip, rows.cut)] and not rows.joined:
            return Rows(rows.stage)  # protected tokens at the ends become others
        if not self.join:
            return None
        self._behind_joins.add(node.outputs[0])
        return replace(rows, before=(*before, *rows.before), behind=(*rows.behind, *behind))

    def _trimmed(self, node: ir.Node, rows: Rows) -> Rows | None:
        """A Slice that leaves out protected tokens at the ends, and nothing else."""
        size = self._size(node.inputs[0])
        found = selected(node, size) if isinstance(size, int) and not rows.joined else None
        if not found or not isinstance(size, int) or found != (*range(found[0], found[-1] + 1),):
            return None
        skip, cut = rows.skip + found[0], rows.cut + size - 1 - found[-1]
        ends = {*range(skip), *range(self.count - cut, self.count)}
        if not ends <= self.protected or (cut and not self.keeps.ordered):
            return None
        return replace(rows, skip=skip, cut=cut)

    def _attends(self, node: ir.Node) -> bool:
        """Take note of an attention to tokens, if it can read fewer of them."""
        q, k, v = node.inputs[:3]
        queries, keys = (None if x is None else self.flow.rows.get(x) for x in (q, k))
        if keys != (None if v is None else self.flow.rows.get(v)):
            return False
        flat = node.attributes.get_int("q_num_heads", 0) > 0
        if not flat or _is_cached(node):
            return False
        if node.attributes.get_int("is_causal", 0) and (queries != keys or not self.keeps.ordered):
            return False
        mask = optional(node, MASK)
        fits = mask is None or self._fits(self.shapes.of(mask), (q, queries), (k, keys))
        if not fits or (mask is not None and mask.dtype is None):
            return False
        self.flow.attends.append(Attend(node, queries, keys))
        if queries is not None:
            self.flow.rows[node.outputs[0]] = queries
        return True

    def _fits(
        self,
        mask: Shape | None,
        queries: tuple[ir.Value | None, Rows | None],
        keys: tuple[ir.Value | None, Rows | None],
    ) -> bool:
        """Whether each axis of a mask is of size one, or has one entry per token."""
        if mask is None or not 2 <= len(mask) <= 4:
            return False
        for size, (value, rows) in zip(mask[-2:], (queries, keys), strict=True):
            if rows is None or size == 1:
                continue
            if not self.keeps.placed or size != self._size(value):
                return False
        return True

    def _reader(self, node: ir.Node, value: ir.Value) -> Reader:
        rows, count = self.flow.rows[value], self._size(value)
        plain = rows == Rows(rows.stage)
        if node.domain == "" and isinstance(count, int) and node.inputs[0] is value and plain:
            positions = selected(node, count)
            if positions is not None:
                return Reader(value, node, Need.SELECT, rows, positions)
        return Reader(value, node, Need.ALL, rows)


def _is_cached(node: ir.Node) -> bool:
    past = any(value is not None for value in node.inputs[4:6])
    return past or any(v.uses() or v.is_graph_output() for v in node.outputs[1:])


def _same_for_all_tokens(shape: Shape | None) -> bool:
    return shape is not None and (len(shape) < 2 or (len(shape) <= 3 and shape[-2] == 1))


def _has_rows(shape: Shape | None, size: Dim | None) -> bool:
    return shape is not None and size is not None and 2 <= len(shape) <= 3 and shape[-2] == size


def _is_table(shape: Shape | None) -> bool:
    return shape is not None and (len(shape) == 2 or shape[0] == 1)


def selected(node: ir.Node, count: int) -> tuple[int, ...] | None:
    """The tokens of ``count`` that a Gather or Slice with constant positions takes out."""
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) in (1, -2):
        index = graphs.const(node.inputs[1])
        if index is None or (index.size and (index.max() >= count or index.min() < -count)):
            return None
        return tuple(int(i) % count for i in index.reshape(-1))
    if node.op_type == "Slice" and len(node.inputs) >= 4:
        numbers = [graphs.const(v) for v in node.inputs[1:]]
        if any(n is None or n.size != 1 for n in numbers):
            return None
        start, end, axis, *step = (int(n.reshape(-1)[0]) for n in numbers if n is not None)
        if axis in (1, -2):
            return tuple(np.arange(count)[start : end : step[0] if step else 1].tolist())
    return None
