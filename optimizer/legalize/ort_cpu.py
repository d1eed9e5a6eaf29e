"""The spelling that ONNX Runtime's CPU kernels run fastest.

Int8 products are in ``int8``, the KV cache in ``kv_in_place``; here is what remains of the float
graph. RMSNormalization, RotaryEmbedding, Gelu and Attention stay the standard operators in their
3-D forms: measured, nothing in ``com.microsoft`` is faster. Causal attention is the exception, see
``spell_causal_attention``.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from optimizer import attention_masks
from optimizer import graph as graphs
from optimizer.attention_masks import MASK
from optimizer.legalize import decompose, int8
from optimizer.legalize.mask_proof import cuts_tokens, find_roles
from optimizer.nodes import by_constant
from optimizer.pass_base import Skip
from optimizer.raising.base import allow
from optimizer.raising.shapes import Shapes

#: Changes of layout that ONNX Runtime moves a quantizer across.
_MOVED = frozenset({"Flatten", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
#: Scores further below the largest of their row than this are raised to it. exp(-60) = 9e-27: all
#: cut-off keys together stay below the rounding of float32 (6e-8) up to 1e18 of them, and the
#: probability stays a normal number (1.2e-38).
_FLOOR = 60.0


@dataclass(frozen=True)
class Lowered:
    """Rewrites by kind, and sites left alone."""

    counts: dict[str, int]
    skipped: tuple[Skip, ...]


def lower(model: ir.Model) -> Lowered:
    """Rewrite ``model`` in place."""
    counts = {
        "causal attention": spell_causal_attention(model),
        "attention mask": widen_masks(model),
    }
    counts["int8 product"], skipped = int8.lower(model)
    counts["residual add"] = spell_residuals(model)
    return Lowered(counts, skipped)


def spell_causal_attention(model: ir.Model) -> int:
    """Write causal attention of whole sequences as MatMul and Softmax, with a floor under scores.

    Where keys are cut off, exp yields denormal numbers inside of Softmax, which x86 processors
    handle many times more slowly: half of all scores in a causal mask. Raised to a floor below
    which they cannot matter, they are ordinary numbers, and Softmax runs at full speed.
    """
    sites = [node for node in model.graph if node.op_type == "Attention" and node.domain == ""]
    roles = find_roles(model, ())
    causal: dict[ir.Value, bool] = {}
    shared: dict[ir.Value, ir.Value] = {}
    count = 0
    for node in sites:
        mask = node.inputs[MASK] if len(node.inputs) > MASK else None
        cut = node.attributes.get_int("is_causal", 0) == 1
        if mask is not None and not isinstance(roles, str) and not cut:
            if mask not in causal:
                causal[mask] = cuts_tokens(model, mask, roles)
            cut = causal[mask]
        if cut and _spells_well(node) and allow(node, "causal attention"):
            decompose.attention(decompose.Pen(model.graph, node, shared, floor=_FLOOR))
            count += 1
    return count


def _spells_well(node: ir.Node) -> bool:
    """Whether this is attention within one sequence, in float32, that only returns its result."""
    if len(node.outputs) != 1 or len(node.inputs) > MASK + 1:
        return False
    if node.attributes.get_int("q_num_heads", 0) == 0:
        return False
    query, key = node.inputs[0], node.inputs[1]
    if query is None or query.dtype not in (None, ir.DataType.FLOAT):
        return False
    shapes = Shapes()
    return all(isinstance((shapes.of(v) or ((),))[-1], int) for v in (query, key, node.inputs[2]))


def spell_row_scales(model: ir.Model) -> int:
    """Write the division by one number per row in front of a quantizer as a multiplication.

    A vector unit multiplies several times as fast as it divides.
    """
    shapes = Shapes()
    count = 0
    for node in list(model.graph):
        if node.op_type != "Div" or node.domain != "":
            continue
        x, scale = node.inputs
        if x is None or scale is None or not _is_quantized(node.outputs[0]):
            continue
        wide, narrow = shapes.of(x), shapes.of(scale)
        if wide is None or narrow is None or narrow[-1:] != (1,) or wide[-1:] == (1,):
            continue
        if not allow(node, "row scale"):
            continue
        inverse = graphs.insert(
            model.graph, node, "Reciprocal", (scale,), name=f"{scale.name}_inverse",
            dtype=scale.dtype, shape=scale.shape,
        )  # fmt: skip
        node.op_type = "Mul"
        node.replace_input_with(1, inverse)
        count += 1
    return count


def _is_quantized(value: ir.Value) -> bool:
    """Whether nothing but a QuantizeLinear reads ``value``, perhaps after a shift."""
    user = graphs.only_user(value)
    if user is not None and user.op_type in ("Add", "Sub") and by_constant(user) is not None:
        user = graphs.only_user(user.outputs[0])
    return user is not None and user.op_type == "QuantizeLinear"


def spell_residuals(model: ir.Model) -> int:
    """Write the Add before a LayerNormalization as a Sum of two.

    ONNX Runtime fuses Add and LayerNormalization into ``SkipLayerNormalization``, whose CPU kernel
    takes several times as long as the two alone; it does not look at Sum, which computes the same.
    """
    count = 0
    for node in model.graph:
        if node.op_type != "LayerNormalization" or node.domain != "" or node.inputs[0] is None:
            continue
        add = node.inputs[0].producer()
        if add is None or add.op_type != "Add" or add.domain != "":
            continue
        if any(graphs.constant(value) is not None for value in add.inputs):
            continue
        if not allow(add, "residual add"):
            continue
        add.op_type = "Sum"
        count += 1
    return count


def widen_masks(model: ir.Model) -> int:
    """Write out the query dimension of attention masks, where the gate lets it."""
    return attention_masks.widen_masks(model, lambda mask: allow(str(mask.name), "attention mask"))


def drop_zero_points(model: ir.Model) -> int:
    """Leave out zero points of 0 where ONNX Runtime would move a pair across a change of layout.

    From opset 21 on it gives the moved quantizer a zero point of another type, and then refuses the
    model it made (1.32). Without one there is nothing to mistake.
    """
    count = 0
    for node in model.graph:
        if node.op_type != "DequantizeLinear" or node.domain != "" or len(node.inputs) < 3:
            continue
        zero = node.inputs[2]
        moved = any(use.node.op_type in _MOVED for use in node.outputs[0].uses())
        if zero is None or zero.dtype != ir.DataType.INT8 or not moved:
            continue
        numbers = graphs.const(zero)
        if numbers is not None and not numbers.any() and allow(node, "zero point"):
            node.resize_inputs(2)
            count += 1
    if count:
        graphs.remove_dead(model)
    return count
