"""Finds groups of linear layers that read one input, and says where that input can be scaled."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import onnx_ir as ir

from optimizer import block_parts as parts
from optimizer import graph as graphs
from optimizer.blocks import find_blocks
from optimizer.linear_layers import (
    SHAPING,
    SHARED,
    is_head,
    is_shared,
    layer_name,
    linear_at,
    matches,
)
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
        found = linear_at(node)
        if isinstance(found, Linear):
            found = _refusal(found, choice) or found
        if isinstance(found, Linear):
            accepted.append(found)
        elif found is not None:
            skipped.append(Skip(layer_name(node), found))
    heads = _float_heads(accepted, choice, _quantized(model)) if transformer else []
    skipped += [Skip(layer_name(linear.matmul), _HEAD) for linear in heads]
    groups: dict[ir.Value, list[Linear]] = {}
    for linear in accepted:
        if linear not in heads:
            groups.setdefault(linear.input, []).append(linear)
    chosen = {linear.output: linear for group in groups.values() for linear in group}
    sites = [_site(value, tuple(linears), chosen) for value, linears in groups.items()]
    return sites, skipped


_HEAD = "computes an output of the model (heads=true, or include it by name, to quantize it)"


def _float_heads(linears: list[Linear], choice: Choice, quantized: int) -> list[Linear]:
    """The layers that compute an output and stay in float; ``quantized``: int8 weights there are.

    Those count as well, so that a second run decides as the first did.
    """
    heads = [x for x in linears if is_head(x.output) and not matches(x, choice.include)]
    if choice.heads is not None:
        return [] if choice.heads else heads
    rest = quantized + sum(_count(linear) for linear in linears if linear not in heads)
    return [linear for linear in heads if _count(linear) < HEAD_SHARE * rest]


def _quantized(model: ir.Model) -> int:
    tensors = (value.const_value for value in model.graph.initializers.values())
    matrices = [t for t in tensors if t is not None and t.dtype == ir.DataType.INT8]
    return sum(math.prod(t.shape.numpy()) for t in matrices if len(t.shape) == 2)


def _count(linear: Linear) -> int:
    return math.prod(dims(linear.weight) or (0,))


def _refusal(linear: Linear, choice: Choice) -> str | None:
    if matches(linear, choice.exclude):
        return "excluded by the options"
    tensor = graphs.constant(linear.weight)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        found = "unknown" if tensor is None else tensor.dtype.name
        return f"its weight is {found}, expected FLOAT, which a model written for ort-cpu has"
    if is_shared(linear):
        return SHARED
    channels, width = dims(linear.weight) or (0, 0)
    if not channels or not width:
        return "its weight is empty"
    if channels > MAX_CHANNELS:
        return f"{channels} input channels can overflow the int32 sum, limit {MAX_CHANNELS}"
    return None


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
    while node is not None and node.domain == "" and node.op_type in SHAPING and node.inputs[0]:
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
    if node.op_type in SHAPING and node.inputs[0] is not None:
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
