"""Recognises the parts of a transformer block in a canonical graph.

A part is found from one of its values and returned as a view (``optimizer.structure``), or as a
reason why there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import dims, node_of, operand, operands, other, users
from optimizer.norm_parts import NORMS, norm
from optimizer.quantized_parts import (
    fed_by,
    quantized_at,
    quantized_linear,
    reads,
    rounded,
    stored,
    weight_of,
)
from optimizer.structure import Attention, Linear, Mlp, Norm

_UNARY = frozenset(
    {
        "Celu", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu",
        "Mish", "Neg", "Pow", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Swish",
        "Tanh", "ThresholdedRelu",
    }
)  # fmt: skip
_BINARY = frozenset({"Add", "Div", "Mul", "Sub", "Pow"})
_LAYOUT = frozenset(
    {"Gather", "Reshape", "RotaryEmbedding", "Slice", "Split", "Squeeze", "Transpose"}
)
# Longer chains than this between a projection and its residual add, or inside an MLP, are no MLP.
_MAX_CHAIN = 8
_MAX_INNER = 24


def linear(output: ir.Value) -> Linear | None:
    """The linear layer whose result is ``output``, with the bias if the last step adds one."""
    found = quantized_linear(output)
    if found is not None:
        return found
    add = node_of(output, "Add")
    if add is None:
        return _matmul(output, None, None)
    for value, bias in (operands(add), operands(add)[::-1]):
        shape = dims(stored(bias))
        found = _matmul(value, add, bias) if shape is not None and len(shape) == 1 else None
        whole = found is not None and shape == (width(found),)  # one number is no bias
        if whole and graphs.only_user(value) is add:
            return found
    return None


def _matmul(value: ir.Value, add: ir.Node | None, bias: ir.Value | None) -> Linear | None:
    matmul = node_of(value, "MatMul")
    if matmul is None:
        return None
    source, weight = operands(matmul)
    if weight_of(weight) is None:
        return None
    output = value if add is None else add.outputs[0]
    return Linear(matmul, add, source, weight, bias, output)


def linear_reading(value: ir.Value) -> list[Linear]:
    """All linear layers whose MatMul multiplies ``value`` itself by a weight."""
    matmuls = (m for m in users(value, "MatMul") if m.inputs[0] is value)
    return [found for m in matmuls if (found := _from_matmul(m)) is not None]


def _from_matmul(matmul: ir.Node) -> Linear | None:
    quantized = quantized_at(matmul)
    if quantized is not None:
        return quantized
    result = matmul.outputs[0]
    add = graphs.only_user(result)
    if add is not None and add.op_type == "Add":
        found = linear(add.outputs[0])
        if found is not None and found.matmul is matmul:
            return found
    return linear(result)


def width(layer: Linear) -> int:
    """N, the number of outputs of a linear layer."""
    shape = dims(stored(layer.weight))
    if shape is None:
        msg = f"weight '{layer.weight.name}' is not a constant"
        raise ValueError(msg)
    return shape[1]


@dataclass(frozen=True)
class Branch:
    """What one side of a residual add went through between its last projection and the add.

    Attributes:
        end: The operand of the add.
        extras: What lies between, as reasons.
    """

    end: ir.Value
    extras: tuple[str, ...] = ()


def _between(node: ir.Node, value: ir.Value, where: str) -> str | None:
    """Why a node after a projection is not plain; None if it does not belong to the branch."""
    if node.domain != "":
        return None
    if node.op_type in NORMS:
        return f"norm after {where}"
    if node.op_type in ("Mul", "Div"):
        shape = dims(other(node, value))
        if shape is None:
            return None
        return f"layer scale after {where}" if _size(shape) > 1 else f"residual scale after {where}"
    if node.op_type == "Add" and graphs.constant(other(node, value)) is not None:
        return f"shift after {where}"
    if node.op_type in _UNARY or node.op_type == "Cast":
        return f"{node.op_type} after {where}"
    return None


def _size(shape: tuple[int, ...]) -> int:
    result = 1
    for d in shape:
        result *= d
    return result


def forward_branches(start: ir.Value, where: str) -> list[tuple[Branch, ir.Node]]:
    """All residual adds that ``start`` reaches through its own branch, with what lies between."""
    value = start
    extras: tuple[str, ...] = ()
    for _ in range(_MAX_CHAIN):
        adds = [a for a in users(value, "Add") if graphs.constant(other(a, value)) is None]
        if adds:
            return [(Branch(value, extras), add) for add in adds]
        nodes = list(dict.fromkeys(use.node for use in value.uses()))
        if len(nodes) != 1:
            return []
        after = rounded(value)
        if after is not value:  # the end of an int8 layer
            value = after
            continue
        reason = _between(nodes[0], value, where)
        if reason is None:
            return []
        value, extras = nodes[0].outputs[0], (*extras, reason)
    return []


def backward_linear(end: ir.Value, where: str) -> tuple[Linear, tuple[str, ...]] | None:
    """The last projection of the branch that ends in ``end``, and what lies between."""
    value = end
    extras: tuple[str, ...] = ()
    for _ in range(_MAX_CHAIN):
        found = linear(value)
        if found is not None:
            return found, extras
        node = value.producer()
        if node is None:
            return None
        source = _branch_input(node)
        reason = None if source is None else _between(node, source, where)
        if source is None or reason is None:
            return None
        value, extras = source, (reason, *extras)
    return None


def _branch_input(node: ir.Node) -> ir.Value | None:
    """The operand that carries the branch: the one that is not constant."""
    values = [v for v in node.inputs if v is not None and graphs.constant(v) is None]
    return values[0] if len(values) == 1 else None


def mlp(down: Linear) -> Mlp | str:
    """The MLP that ends in ``down``, or why it is none."""
    inner: dict[ir.Node, None] = {}
    first: dict[ir.Value, Linear] = {}
    stack = [down.input]
    while stack:
        value = stack.pop()
        found = linear(value)
        if found is not None:
            first.setdefault(value, found)
            continue
        if graphs.constant(value) is not None:
            continue
        node = value.producer()
        if node is not None and node in inner:
            continue
        if node is None or node.domain != "" or len(inner) >= _MAX_INNER:
            return "the MLP does not start with a linear layer"
        if node.op_type not in _UNARY | _BINARY:
            return f"{node.op_type} inside the MLP"
        inner[node] = None
        stack.extend(v for v in reversed(node.inputs) if v is not None)
    ordered = _sorted(inner)
    linears = list(first.values())
    if len(linears) == 1:
        return Mlp(linears[0], None, down, _activation(linears[0].output, ordered), ordered)
    if len(linears) != 2:
        return f"{len(linears)} linear layers enter the MLP's last one, expected 1 or 2"
    return _gated(down, linears, ordered)


def _gated(down: Linear, linears: list[Linear], inner: tuple[ir.Node, ...]) -> Mlp | str:
    if linears[0].input is not linears[1].input:
        return "the two first layers of the MLP read different values"
    product = node_of(down.input, "Mul")
    if product is None:
        return "the two first layers of the MLP are not multiplied"
    for up, gate in (linears, linears[::-1]):
        if up.output not in operands(product):
            continue
        side = other(product, up.output)
        nodes = tuple(n for n in inner if n is not product)
        if side is gate.output or (nodes and side is nodes[-1].outputs[0]):
            return Mlp(up, gate, down, _activation(gate.output, nodes), inner)
    return "the MLP does not multiply an activation of one layer by the other"


def _sorted(nodes: dict[ir.Node, None]) -> tuple[ir.Node, ...]:
    """Producers before their users."""
    ordered: dict[ir.Node, None] = {}
    pending = list(nodes)
    while pending:
        ready = [n for n in pending if not any(p in pending for p in n.predecessors())]
        ordered.update(dict.fromkeys(ready))
        pending = [n for n in pending if n not in ordered]
    return tuple(ordered)


def _activation(source: ir.Value, nodes: tuple[ir.Node, ...]) -> str:
    """The name of the function ``nodes`` compute from ``source``."""
    types = [n.op_type for n in nodes]
    if not types:
        return "identity"
    if types == ["Gelu"]:
        approximate = nodes[0].attributes.get_string("approximate", "none")
        return "gelu-tanh" if approximate == "tanh" else "gelu"
    if types == ["Swish"] and nodes[0].attributes.get_float("alpha", 1.0) == 1.0:
        return "silu"
    if types == ["Sigmoid", "Mul"] and source in nodes[1].inputs:
        return "silu"
    if types == ["Mul", "Sigmoid", "Mul"] and source in nodes[0].inputs:
        factor = graphs.scalar(other(nodes[0], source))
        # In bfloat16, the coarsest type, the factor is within 2^-8 of itself.
        if factor is not None and abs(factor / 1.702 - 1) <= 2**-8 and source in nodes[2].inputs:
            return "quick-gelu"
    return "+".join(t.lower() for t in types)


#: Attention of ONNX Runtime that keeps each row's cache by itself; it has no standard form.
GROUPED = "GroupQueryAttention"


def attention(node: ir.Node) -> Attention | str:
    """The view of a canonical Attention or a GroupQueryAttention, or why it is none."""
    grouped = node.op_type == GROUPED
    heads = node.attributes.get_int("num_heads" if grouped else "q_num_heads", 0)
    kv_heads = node.attributes.get_int("kv_num_heads", 0)
    if not heads or not kv_heads:
        return "the Attention has 4-D inputs, not the canonical 3-D ones"
    sides = [_side(node.inputs[i]) for i in range(3)]
    for name, side, value in zip(("query", "key", "value"), sides, node.inputs[:3], strict=True):
        if side is None:
            return f"the {name} is {_instead(value)}"
    q, k, v = (side for side in sides if side is not None)
    if v.norm is not None or v.rotary is not None:
        return "the value passes a norm or a rotary embedding"
    source = q.linear.input
    if k.linear.input is not source or v.linear.input is not source:
        return "query, key and value read different values (cross-attention)"
    o = projection_of(node.outputs[0])
    if o is None:
        return "the output is not read by exactly one linear projection"
    size, value_size = width(q.linear) // heads, width(v.linear) // kv_heads
    if k.repeats != v.repeats:
        return "keys and values are repeated differently"
    if width(k.linear) * k.repeats != size * kv_heads or value_size * v.repeats != size:
        return "query, key and value heads have different sizes"
    present_key, present_value = (*node.outputs[1:3], None, None)[:2]
    turns = node if grouped and node.attributes.get_int("do_rotary", 0) == 1 else None
    extra = (*node.inputs[3:], None, None, None)
    flag = node.attributes.get("causal" if grouped else "is_causal")
    causal = grouped if flag is None else flag.as_int() == 1
    return Attention(
        node, q.linear, k.linear, v.linear, o, q.rotary or turns, k.rotary or turns, q.norm, k.norm,
        heads=heads, kv_heads=kv_heads, head_dim=size,
        scale=node.attributes.get_float("scale", 0.0) or size**-0.5,
        softcap=node.attributes.get_float("softcap", 0.0),
        mask=None if grouped else extra[0],
        is_causal=causal,
        past_key=extra[0 if grouped else 1], past_value=extra[1 if grouped else 2],
        present_key=present_key, present_value=present_value, repeats=k.repeats,
    )  # fmt: skip


@dataclass(frozen=True)
class _Side:
    linear: Linear
    norm: Norm | None
    rotary: ir.Node | None
    repeats: int = 1


def _side(value: ir.Value | None) -> _Side | None:
    """What lies between a projection and an input of the Attention."""
    if value is None:
        return None
    rotary = node_of(value, "RotaryEmbedding")
    if rotary is not None and rotary.inputs[0] is not None:
        value = rotary.inputs[0]
    found = _head_norm(value)
    if found is not None:
        value = _under_reshape(found.input)
    value, repeats = _unrepeated(value)
    projection = linear(value)
    return None if projection is None else _Side(projection, found, rotary, repeats)


def _instead(value: ir.Value | None) -> str:
    """What queries, keys or values are that are not the result of a linear layer."""
    for _ in range(_MAX_CHAIN):
        node = None if value is None else value.producer()
        if value is None or node is None or node.op_type not in _LAYOUT:
            break
        found = linear(operand(node))
        if found is not None and _count(node) > 1:
            quantized = (
                node_of(found.weight, "DequantizeLinear") or found.matmul.op_type != "MatMul"
            )
            return f"a part of a packed layer{', whose weights are quantized' if quantized else ''}"
        value = operand(node)
    return "not a linear projection"


def _count(node: ir.Node) -> int:
    """How many parts the source of a layout change is cut into, at least."""
    return max(len(node.outputs), len(operand(node).uses()))


def _unrepeated(value: ir.Value) -> tuple[ir.Value, int]:
    """(x, n) of ``Reshape(Expand(Reshape(x, [.., 1, c]), [.., n, c]), [.., n*c])``, else n = 1."""
    expand = node_of(_under_reshape(value), "Expand")
    split = None if expand is None else node_of(expand.inputs[0], "Reshape")
    if expand is None or split is None or split.inputs[0] is None:
        return value, 1
    shapes = [v.shape for v in (expand.inputs[0], expand.outputs[0]) if v is not None]
    narrow, wide = (
        shape.dims[-2] if shape is not None and len(shape) == 5 else None for shape in shapes
    )
    known = narrow == 1 and isinstance(wide, int)
    return (split.inputs[0], wide) if known and isinstance(wide, int) else (value, 1)


def _head_norm(value: ir.Value) -> Norm | None:
    """A norm over the head (between two Reshapes) or over the whole width."""
    return norm(_under_reshape(value))


def _under_reshape(value: ir.Value) -> ir.Value:
    reshape = node_of(value, "Reshape")
    return value if reshape is None or reshape.inputs[0] is None else reshape.inputs[0]


def projection_of(value: ir.Value) -> Linear | None:
    """The one linear layer that reads ``value``, None if anything else reads it too."""
    found = linear_reading(value) or fed_by(value)
    readers = {use.node for use in value.uses()}
    return found[0] if len(found) == 1 and readers <= reads(found[0]) else None
