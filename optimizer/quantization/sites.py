"""Finds groups of linear layers that read one input, and says where that input can be scaled."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from optimizer import block_parts as parts
from optimizer import graph as graphs
from optimizer.blocks import find_blocks
from optimizer.nodes import by_constant, dims, node_of, operands
from optimizer.norm_parts import norm as norm_of
from optimizer.pass_base import Skip
from optimizer.structure import Linear, Norm

#: Weights of a head, as a share of all other quantized weights, from which on 'auto' quantizes it.
#: An int8 product is about 4 times as fast as in float, so a head h beside r takes h / (h + r / 4)
#: of the time in float: 5 % at h = r / 76.
HEAD_SHARE = 1 / 76

#: A sum of K products of codes stays below 2^31 up to this K (127 * 127 * K < 2^31).
MAX_CHANNELS = (2**31 - 1) // 127**2

# Minimum of x * sigmoid(x), of x * Phi(x) and of its tanh form, rounded down.
_SILU_LOW, _GELU_LOW, _GELU_TANH_LOW = -0.27846455, -0.16997122, -0.17004079
_NON_NEGATIVE = frozenset({"Relu", "Sigmoid", "Softmax", "Exp", "Abs", "Sqrt", "Softplus"})
_SHAPING = frozenset({"Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Flatten"})
_AFTER_HEAD = _SHAPING | {
    "Cast", "Tanh", "Softmax", "LogSoftmax", "Sigmoid", "Mul", "Div", "Clip", "ArgMax", "TopK",
}  # fmt: skip


class Kind(enum.Enum):
    """What the input of a site comes from."""

    NORM = "norm"
    ATTENTION = "attention"
    MLP = "mlp"
    OTHER = "other"


@dataclass(frozen=True)
class Site:
    """Linear layers that share one input.

    Attributes:
        name: Of the input.
        input: [..., K].
        linears: In graph order.
        norm: Takes scales and shift: every reader of its output is a layer of this site.
        source: A linear layer that scales the input exactly, channel by channel, through its own
            output channels (the ``up`` of a gated MLP), and is quantized itself.
        lower: The input is never below this, whatever the data; None = unknown.
        outside: Why ``norm`` is None although a norm computes the input.
    """

    name: str
    kind: Kind
    input: ir.Value
    linears: tuple[Linear, ...]
    norm: Norm | None = None
    source: Linear | None = None
    lower: float | None = None
    outside: str | None = None


@dataclass(frozen=True)
class Choice:
    """Which layers the user wants.

    Attributes:
        include, exclude: Shell patterns over names of weights and nodes.
        heads: Whether layers that compute an output of a transformer are taken; None = where they
            hold more than ``HEAD_SHARE`` of the weights.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    heads: bool | None = None


def find_sites(model: ir.Model, choice: Choice | None = None) -> tuple[list[Site], list[Skip]]:
    """All sites of the main graph in order, and linear layers left alone with the reason."""
    choice = choice or Choice()
    structure = find_blocks(model)
    transformer = bool(structure.blocks or structure.misses)
    accepted: list[Linear] = []
    skipped: list[Skip] = []
    for node in model.graph:
        found = _linear_at(node)
        if isinstance(found, Linear):
            found = _refusal(found, choice) or found
        if isinstance(found, Linear):
            accepted.append(found)
        elif found is not None:
            skipped.append(Skip(_name(node), found))
    heads = _float_heads(accepted, choice) if transformer else []
    skipped += [Skip(_name(linear.matmul), _HEAD) for linear in heads]
    groups: dict[ir.Value, list[Linear]] = {}
    for linear in accepted:
        if linear not in heads:
            groups.setdefault(linear.input, []).append(linear)
    chosen = {linear.output: linear for group in groups.values() for linear in group}
    sites = [_site(value, tuple(linears), chosen) for value, linears in groups.items()]
    return sites, skipped


def _name(node: ir.Node) -> str:
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    named = weight is not None and graphs.constant(weight) is not None
    return str(weight.name if named and weight is not None else node.name or node.op_type)


def _linear_at(node: ir.Node) -> Linear | str | None:
    """The linear layer of a node; why it is none; None for a product of two activations."""
    if node.domain != "":
        return None
    if node.op_type == "Gemm" and graphs.constant(node.inputs[1]) is not None:
        return "a Gemm that is not in the canonical form MatMul + Add"
    if node.op_type != "MatMul":
        return None
    left, right = operands(node)
    if node_of(right, "DequantizeLinear") or node_of(left, "DequantizeLinear"):
        return "already quantized"
    if right.is_initializer() and right.is_graph_input():
        return "its weight is a graph input, which the caller may override"
    shape = dims(right)
    if shape is None:
        return _constant_elsewhere(left, right)
    if len(shape) != 2:
        return f"its weight has {len(shape)} dimensions, expected a matrix"
    return next((x for x in parts.linear_reading(left) if x.matmul is node), None)


def _constant_elsewhere(left: ir.Value, right: ir.Value) -> str | None:
    if graphs.constant(left) is not None:
        return "its constant is the first factor"
    transpose = node_of(right, "Transpose")
    if transpose is not None and graphs.constant(transpose.inputs[0]) is not None:
        return "its weight is used elsewhere too, and transposed for this layer"
    return None


_HEAD = "computes an output of the model (heads=true, or include it by name, to quantize it)"


def _float_heads(linears: list[Linear], choice: Choice) -> list[Linear]:
    """The layers that compute an output and stay in float."""
    heads = [x for x in linears if is_head(x.output) and not _matches(x, choice.include)]
    if choice.heads is not None:
        return [] if choice.heads else heads
    rest = sum(_count(linear) for linear in linears if linear not in heads)
    return [linear for linear in heads if _count(linear) < HEAD_SHARE * rest]


def _count(linear: Linear) -> int:
    return math.prod(dims(linear.weight) or (0,))


def _matches(linear: Linear, patterns: tuple[str, ...]) -> bool:
    names = (str(linear.weight.name), str(linear.matmul.name))
    return any(fnmatchcase(n, pattern) for n in names for pattern in patterns)


def _refusal(linear: Linear, choice: Choice) -> str | None:
    if _matches(linear, choice.exclude):
        return "excluded by the options"
    tensor = graphs.constant(linear.weight)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        found = "unknown" if tensor is None else tensor.dtype.name
        return f"its weight is {found}, expected FLOAT, which a model written for ort-cpu has"
    readers = {use.node for use in linear.weight.uses()}
    if len(readers) > 1 or linear.weight.is_graph_output():
        return "its weight is used elsewhere too"
    channels, width = dims(linear.weight) or (0, 0)
    if not channels or not width:
        return "its weight is empty"
    if channels > MAX_CHANNELS:
        return f"{channels} input channels can overflow the int32 sum, limit {MAX_CHANNELS}"
    return None


def is_head(value: ir.Value) -> bool:
    """Whether outputs of the model are all that ``value`` is for, but for simple steps after it.

    A key that is returned for a cache and read by the attention too is no head.
    """
    pending, seen, reached = [value], {value}, False
    while pending:
        current = pending.pop()
        reached = reached or current.is_graph_output()
        for node in users_of(current):
            by_constant_term = node.op_type in {"Add", "Sub"} and any(
                graphs.constant(operand) is not None for operand in node.inputs
            )
            if node.op_type not in _AFTER_HEAD and not by_constant_term:
                return False
            fresh = [v for v in node.outputs if v not in seen]
            pending.extend(fresh)
            seen.update(fresh)
    return reached


def users_of(value: ir.Value) -> Iterator[ir.Node]:
    """The standard nodes that read ``value``, each once."""
    nodes = dict.fromkeys(use.node for use in value.uses())
    return (node for node in nodes if node.domain == "")


def _site(value: ir.Value, linears: tuple[Linear, ...], chosen: dict[ir.Value, Linear]) -> Site:
    matmuls = {linear.matmul for linear in linears}
    alone = not value.is_graph_output() and {use.node for use in value.uses()} <= matmuls
    norm = norm_of(value)
    kind = _kind(value)
    source = _source(value, chosen) if alone else None
    outside = None
    if norm is not None and not alone:
        outside = "the norm's output is read elsewhere too"
    elif norm is not None and norm.scale.dtype != ir.DataType.FLOAT:
        outside = "the norm's scale is not FLOAT"
    return Site(
        name=str(value.name),
        kind=kind,
        input=value,
        linears=linears,
        norm=norm if outside is None else None,
        source=source,
        lower=lower_bound(value),
        outside=outside,
    )


def _kind(value: ir.Value) -> Kind:
    """What computed ``value``, looking through steps that only move numbers around."""
    node = value.producer()
    while node is not None and node.domain == "" and node.op_type in _SHAPING and node.inputs[0]:
        node = node.inputs[0].producer()
    if node is not None and node.op_type == parts.GROUPED:
        return Kind.ATTENTION
    if node is None or node.domain != "":
        return Kind.OTHER
    if norm_of(node.outputs[0]) is not None:
        return Kind.NORM
    if node.op_type == "Attention":
        return Kind.ATTENTION
    if lower_bound(node.outputs[0]) is not None:
        return Kind.MLP
    if node.op_type == "Mul" and any(_is_activated(v) for v in operands(node)):
        return Kind.MLP
    return Kind.OTHER


def _is_activated(value: ir.Value) -> bool:
    return lower_bound(value) is not None or node_of(value, "Tanh", "Gelu", "Mish") is not None


def _source(value: ir.Value, chosen: dict[ir.Value, Linear]) -> Linear | None:
    """The linear layer whose output is multiplied into ``value`` and read by nothing else."""
    product = node_of(value, "Mul")
    if product is None:
        return None
    for operand in operands(product)[::-1]:
        linear = chosen.get(operand)
        if linear is not None and graphs.only_user(operand) is product:
            return linear
    return None


def lower_bound(value: ir.Value) -> float | None:
    """A number that ``value`` is never below, proven by the operator that computes it."""
    node = value.producer()
    if node is None or node.domain != "":
        return None
    if node.op_type in _NON_NEGATIVE:
        return 0.0
    if node.op_type == "Gelu":
        tanh = node.attributes.get_string("approximate", "none") == "tanh"
        return _GELU_TANH_LOW if tanh else _GELU_LOW
    if node.op_type == "Mul":
        return _sigmoid_product(node)
    if node.op_type in _SHAPING and node.inputs[0] is not None:
        return lower_bound(node.inputs[0])
    return None


def _sigmoid_product(node: ir.Node) -> float | None:
    """Lower bound of x * sigmoid(x) and x * sigmoid(1.702 x)."""
    first, second = operands(node)
    for x, gate in ((first, second), (second, first)):
        sigmoid = node_of(gate, "Sigmoid")
        inner = None if sigmoid is None else sigmoid.inputs[0]
        if inner is x:
            return _SILU_LOW
        scaled = node_of(inner, "Mul")
        split = None if scaled is None else by_constant(scaled)
        if split is not None and split[0] is x and abs(split[1] - 1.702) < 1e-3:
            return _SILU_LOW / float(split[1])
    return None
