"""When consecutive layers may become one group, and if not, why.

Every condition is one function from the members to a reason or None. The reasons are shown to the
user, so they say what was found in words of the model, not of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import onnx_ir as ir

from optimizer.fusion.shapes import mask_heads
from optimizer.fusion.weights import Affine, overflows
from optimizer.graph import const, constant
from optimizer.structure import Block, Linear, NormKind, Style

#: Metadata key of the Attention node of a group.
GROUP_KEY = "optimize.group"


def refusal(members: Sequence[Block]) -> str | None:
    """Why ``members`` cannot become one group; None if they can.

    Args:
        members: At least two blocks, in order.
    """
    return next((reason for check in _CHECKS if (reason := check(members)) is not None), None)


def linears(block: Block) -> tuple[Linear, ...]:
    """All linear layers of a block: q, k, v, o, up, gate (if any), down."""
    a, m = block.attention, block.dense
    gate = () if m.gate is None else (m.gate,)
    return (a.q, a.k, a.v, a.o, m.up, *gate, m.down)


def gain_after(linear: Linear, add: ir.Node) -> tuple[tuple[ir.Node, ...], ir.Value] | None:
    """The diagonal gains (Mul or Div by a constant) between ``linear`` and its residual add.

    Returns:
        Their nodes, and the operand of ``add``; None if anything else is in between.
    """
    nodes: list[ir.Node] = []
    value = linear.output
    while add not in (users := [use.node for use in value.uses()]):
        if len(users) != 1 or users[0].op_type not in ("Mul", "Div"):
            return None
        node = users[0]
        divides = node.op_type == "Div" and node.inputs[0] is not value
        if divides or not _is_diagonal(_other(node, value)):
            return None
        nodes.append(node)
        value = node.outputs[0]
    return tuple(nodes), value


def _is_diagonal(value: ir.Value | None) -> bool:
    """A constant that multiplies along the last axis only: [D], [1, D], [1], []."""
    tensor = constant(value)
    if tensor is None:
        return False
    shape = tensor.shape.numpy()
    return len(shape) <= 3 and all(d == 1 for d in shape[:-1])


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _same(members: Sequence[Block], what: str, key: Callable[[Block], object]) -> str | None:
    first = key(members[0])
    for block in members[1:]:
        if key(block) != first:
            return f"layers {members[0].index} and {block.index} have different {what}"
    return None


def _plain(members: Sequence[Block]) -> str | None:
    for block in members:
        if GROUP_KEY in block.attention.node.metadata_props:
            return f"layer {block.index} is a group already"
        if block.style is Style.POST_NORM:
            return (
                "post-norm: each layer normalizes the residual stream itself, so layers that run "
                "side by side cannot be added up exactly"
            )
        for extra in block.extras:
            if not extra.startswith(("layer scale", "residual scale")):
                reason = _EXTRAS.get(extra, f"{extra}, which is no constant gain")
                return f"layer {block.index}: {reason}"
        if any(constant(linear.weight) is None for linear in linears(block)):
            return f"layer {block.index}: quantized weights; group before quantization"
        if _gains(block) is None:
            return f"layer {block.index}: a gain before the residual add is not constant"
    return None


_EXTRAS = {
    "mixture of experts": "mixture of experts; the routers of two layers cannot become one",
    "norm after attention": "a norm between the attention and its residual add (sandwich norm)",
    "norm after MLP": "a norm between the MLP and its residual add (sandwich norm)",
    "cross-attention": "attention to an encoder's output, which groups do not hold",
    "quantized weights": "quantized weights; group before quantization",
    "attention scores are read": "the attention scores are read",
}


def _gains(block: Block) -> tuple[object, object] | None:
    after_attention = gain_after(block.attention.o, block.attention_add)
    after_mlp = gain_after(block.dense.down, block.mlp_add)
    if after_attention is None or after_mlp is None:
        return None
    return after_attention, after_mlp


def _adjacent(members: Sequence[Block]) -> str | None:
    for before, after in pairwise(members):
        if before.output is not after.input:
            return (
                f"layer {after.index} does not read the output of layer {before.index}: "
                "something lies between them"
            )
    return _same(members, "residual styles (pre-norm, parallel)", lambda b: b.style)


def _norms(members: Sequence[Block]) -> str | None:
    for b in members:
        norms = (b.attention_norm, b.mlp_norm, b.attention.q_norm, b.attention.k_norm)
        if any(norm is not None and norm.kind is NormKind.TANH for norm in norms):
            return f"layer {b.index}: a dynamic tanh, whose own alpha leaves no value to share"
    return (
        _same(members, "kinds of norm", lambda b: (b.attention_norm.kind, b.mlp_norm.kind))
        or _same(members, "norm epsilons", lambda b: (b.attention_norm.epsilon, b.mlp_norm.epsilon))
        or _same(
            members,
            "norm precisions",
            lambda b: tuple(
                n.node.attributes.get_int("stash_type", 1) for n in (b.attention_norm, b.mlp_norm)
            ),
        )
    )


def _attention(members: Sequence[Block]) -> str | None:
    return (
        _same(members, "head sizes", lambda b: b.attention.head_dim)
        or _same(
            members,
            "ratios of query heads to key heads",
            lambda b: b.attention.heads / b.attention.kv_heads,
        )
        or _same(members, "attention masks", lambda b: _id(b.attention.mask))
        or _same(members, "causal flags", lambda b: b.attention.is_causal)
        or _same(members, "logit soft-caps", lambda b: b.attention.softcap)
        or _same(members, "attention attributes", _attention_attributes)
        or _same(members, "rotary embeddings", _rotary)
        or _same(members, "query/key norms", _head_norms)
        or _head_norm_forms(members)
    )


def _id(value: ir.Value | None) -> int:
    return 0 if value is None else id(value)


_PER_LAYER = frozenset({"q_num_heads", "kv_num_heads", "scale", "softcap", "is_causal"})


def _attention_attributes(block: Block) -> object:
    node = block.attention.node
    rest = sorted((k, _attribute(v)) for k, v in node.attributes.items() if k not in _PER_LAYER)
    return (*rest, *(_id(v) for v in node.inputs[6:]))


def _attribute(attribute: ir.Attr) -> object:
    value = attribute.value
    return tuple(value) if isinstance(value, list | tuple) else value


def _rotary(block: Block) -> object:
    return tuple(
        node
        and (
            *sorted((k, _attribute(v)) for k, v in node.attributes.items() if k != "num_heads"),
            *(_id(v) for v in node.inputs[1:]),
        )
        for node in (block.attention.q_rotary, block.attention.k_rotary)
    )


def _head_norms(block: Block) -> object:
    return tuple(
        norm and (norm.kind, norm.epsilon, norm.bias is None, constant(norm.scale).size)  # type: ignore[union-attr]
        for norm in (block.attention.q_norm, block.attention.k_norm)
    )


def _head_norm_forms(members: Sequence[Block]) -> str | None:
    """A norm over the whole width normalizes each member's heads on their own: sizes must agree."""
    for block in members:
        attention = block.attention
        for norm in (attention.q_norm, attention.k_norm):
            tensor = None if norm is None else constant(norm.scale)
            if tensor is not None and tensor.size != attention.head_dim:
                return _same(members, "head counts under a norm of all heads", _head_counts)
    return None


def _head_counts(block: Block) -> object:
    return block.attention.heads, block.attention.kv_heads


def _mlp(members: Sequence[Block]) -> str | None:
    reason = _same(members, "activations", activation_signature)
    if reason is not None:
        return reason
    if activation_signature(members[0]) is None:
        return f"layer {members[0].index}: the activation has per-channel constants"
    return None


def activation_signature(block: Block) -> object | None:
    """The function between first and last linear, comparable between layers.

    Returns:
        None if a constant of more than one element takes part, which would have to be concatenated.
    """
    mlp = block.dense
    names: dict[int, object] = {id(mlp.up.output): "up"}
    if mlp.gate is not None:
        names[id(mlp.gate.output)] = "gate"
    steps: list[object] = []
    for node in mlp.inner:
        inputs = []
        for value in node.inputs:
            name = names.get(_id(value))
            tensor = constant(value)
            if name is None and tensor is not None:
                if tensor.size != 1:
                    return None
                name = float(tensor.numpy().reshape(-1)[0])
            inputs.append(name)
        attributes = tuple(sorted((k, _attribute(v)) for k, v in node.attributes.items()))
        steps.append((node.domain, node.op_type, attributes, tuple(inputs)))
        names[id(node.outputs[0])] = len(steps)
    return tuple(steps)


def _weights(members: Sequence[Block]) -> str | None:
    for block in members:
        for linear in linears(block):
            name = linear.weight.name
            if len(linear.weight.uses()) != 1 or linear.weight.is_graph_output():
                return f"weight '{name}' is shared with another node"
            if _ranks_differ(linear):
                return f"the bias of '{name}' is not a vector of its width"
        q, k, v, _, *first, _ = linears(block)
        readers = [(block.attention_norm, linear) for linear in (q, k, v)]
        for norm, linear in (*readers, *((block.mlp_norm, linear) for linear in first)):
            if overflows(Affine.of(linear, norm)):
                return f"folding the norm's scale into '{linear.weight.name}' overflows float16"
    return _same(members, "weight types", lambda b: tuple(_type(w) for w in linears(b)))


def _ranks_differ(linear: Linear) -> bool:
    bias, weight = constant(linear.bias), constant(linear.weight)
    return bias is not None and weight is not None and bias.size != weight.shape[1]


def _type(linear: Linear) -> object:
    tensor = constant(linear.weight)
    return None if tensor is None else tensor.dtype


def nodes_of(block: Block) -> tuple[ir.Node, ...]:
    """Every node between the stream that enters a block and the one that leaves it.

    Found backwards from the output; masks, rotary tables, caches and shape arithmetic are not of
    the block.
    """
    stream = block.attention_norm.source
    stop = {stream, block.attention.mask, *block.attention.node.inputs[3:]}
    nodes: dict[ir.Node, None] = {}
    stack = [block.output]
    while stack:
        value = stack.pop()
        node = value.producer()
        if value in stop or node is None or node in nodes:
            continue
        nodes[node] = None
        stack.extend(v for v in _data_inputs(node) if v is not None)
    return tuple(nodes)


def _data_inputs(node: ir.Node) -> Sequence[ir.Value | None]:
    count = {"Attention": 3, "RotaryEmbedding": 1, "Reshape": 1}.get(node.op_type)
    return node.inputs if count is None else node.inputs[:count]


def _private(members: Sequence[Block]) -> str | None:
    """No value inside the group may be read outside of it."""
    nodes = {node for block in members for node in nodes_of(block)}
    for block in members:
        cached = (block.attention.present_key, block.attention.present_value)
        for value in _values(block):
            if value in cached or value is members[-1].output:
                continue
            what = _describe(block, value)
            if value.is_graph_output():
                return f"{what} is a graph output"
            for use in value.uses():
                if use.node not in nodes:
                    return f"{what} is also read by node '{use.node.name}'"
    return None


def _values(block: Block) -> Iterator[ir.Value]:
    named = [v for v in (block.hidden, block.output) if v is not None]
    yield from named
    for node in nodes_of(block):
        yield from (value for value in node.outputs if value not in named)


def _describe(block: Block, value: ir.Value) -> str:
    if value is block.output:
        return f"the stream after layer {block.index}"
    if value is block.hidden:
        return f"the stream between attention and MLP of layer {block.index}"
    return f"value '{value.name}' inside layer {block.index}"


def _cache(members: Sequence[Block]) -> str | None:
    attentions = [block.attention for block in members]
    reason = _same(
        members,
        "KV cache (with and without)",
        lambda b: (
            b.attention.past_key is None,
            b.attention.past_value is None,
            *(_written(v) for v in (b.attention.present_key, b.attention.present_value)),
        ),
    )
    if reason is not None:
        return reason
    for block, attention in zip(members, attentions, strict=True):
        for value in (attention.past_key, attention.past_value):
            if value is None:
                continue
            if not value.is_graph_input():
                return f"the past of layer {block.index} ('{value.name}') is not a graph input"
            if (reason := _foreign_use(value, attention.node)) is not None:
                return f"the past of layer {block.index} {reason}"
        for value in (attention.present_key, attention.present_value):
            if value is not None and (reason := _foreign_use(value, None)) is not None:
                return f"the present of layer {block.index} {reason}"
    return None


def _written(value: ir.Value | None) -> bool:
    return value is not None and (value.is_graph_output() or bool(value.uses()))


def _foreign_use(value: ir.Value, attention: ir.Node | None) -> str | None:
    for use in value.uses():
        if use.node is not attention and use.node.op_type != "Shape":
            return f"('{value.name}') is also read by node '{use.node.name}'"
    return None


def _mask(members: Sequence[Block]) -> str | None:
    heads = mask_heads(members[0].attention.mask)
    if heads is None:
        return "the number of heads of the attention mask is not known"
    if heads not in (1, members[0].attention.heads):
        return f"the attention mask has {heads} heads, the attention {members[0].attention.heads}"
    if heads != 1:
        return _same(members, "head counts under a mask per head", _head_counts)
    return None


_CHECKS = (_plain, _adjacent, _norms, _attention, _mlp, _mask, _cache, _weights, _private)


def constant_gain(nodes: Sequence[ir.Node], start: ir.Value) -> object:
    """Product of the gains found by ``gain_after``, as [D] or a number (1.0 for none)."""
    total: object = None
    value = start
    for node in nodes:
        factor = const(_other(node, value))
        assert factor is not None  # noqa: S101  (gain_after saw a constant)
        factor = factor.reshape(-1).astype("float64")
        factor = 1.0 / factor if node.op_type == "Div" else factor
        total = factor if total is None else total * factor  # type: ignore[operator]
        value = node.outputs[0]
    return total
