"""What an attention mask does to tokens that are merged, found by evaluating it.

The mask's computation is cut out and run with the ONNX reference on batches of one and two. A mask
that hides nothing can be left out; one that hides padding tells which tokens have no size. Any
other mask speaks about single pairs of tokens, and merged tokens have no place in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from optimizer import graph as graphs

#: Float masks: from here on a score is cut off.
_CUT = -1e4


@dataclass(frozen=True)
class Padding:
    """A mask that hides padding.

    Attributes:
        source: The graph input [B, N], other than 0 where there is a token; None: nothing is
            hidden.
    """

    source: ir.Value | None = None


def read_mask(model: ir.Model, mask: ir.Value | None, count: int) -> Padding | str:
    """What ``mask`` hides from ``count`` tokens, or why it cannot be kept when they are merged."""
    if mask is None:
        return Padding()
    nodes, inputs, read = _ancestors(mask)
    if any(True for node in nodes for _ in graphs.attribute_graphs(node)):
        return "its attention mask depends on control flow"
    if len(read) > 1:
        return "its attention mask depends on more than one input"
    source = next(iter(read), None)
    if source is not None and (source.shape is None or len(source.shape) != 2):
        return f"its attention mask depends on the numbers in input '{source.name}'"
    extracted = ir.convenience.extract(model.graph, inputs, [mask])
    extracted.opset_imports.update(model.graph.opset_imports)
    for value in (*extracted.inputs, *extracted.outputs):
        value.shape = None
    try:
        evaluator = ReferenceEvaluator(ir.to_proto(ir.Model(extracted, ir_version=10)))
        found = [_hidden(evaluator, inputs, source, count, batch) for batch in (1, 2)]
    except Exception as error:  # the reference raises whatever it likes
        text = " ".join(str(error).split())[:120]
        return f"its attention mask cannot be evaluated ({text})"
    reason = next((text for text in found if text), None)
    return Padding(source) if reason is None else reason


def _hidden(
    evaluator: ReferenceEvaluator,
    inputs: tuple[ir.Value, ...],
    source: ir.Value | None,
    count: int,
    batch: int,
) -> str | None:
    """None where the mask hides padding and nothing else from each real token."""
    valid = np.random.default_rng(batch).integers(0, 2, (batch, count)).astype(bool)
    valid[:, 0] = True
    feed = {str(v.name): _feed(v, valid if v is source else None, batch, count) for v in inputs}
    mask = np.asarray(evaluator.run(None, feed)[0])
    if mask.dtype != np.bool_:
        if np.any((mask != 0) & (mask > _CUT)):
            return "its attention mask adds numbers to scores, such as a bias by position"
        mask = mask == 0
    expected = valid if source is not None else np.ones_like(valid)
    shape = np.broadcast_shapes(mask.shape, (batch, 1, count, count))
    attended = np.broadcast_to(mask, shape)
    if shape[0] != batch or shape[2:] != (count, count):
        return f"its attention mask has shape {list(mask.shape)}, for {count} tokens"
    rows = np.broadcast_to(expected[:, None, :, None], shape)
    keys = np.broadcast_to(expected[:, None, None, :], shape)
    if np.any((attended != keys) & rows):
        return "its attention mask hides more than padding"
    return None


def _feed(value: ir.Value, valid: np.ndarray | None, batch: int, count: int) -> np.ndarray:
    dtype = np.float32 if value.dtype is None else value.dtype.numpy()
    if valid is not None:
        return valid.astype(dtype)
    dims = [] if value.shape is None else list(value.shape)
    sizes = [d if isinstance(d, int) else (count if i else batch) for i, d in enumerate(dims)]
    return np.zeros(sizes, dtype)


def _ancestors(
    mask: ir.Value,
) -> tuple[tuple[ir.Node, ...], tuple[ir.Value, ...], tuple[ir.Value, ...]]:
    """Nodes, graph inputs, and those inputs whose numbers are read, not only their shape."""
    nodes: dict[ir.Node, None] = {}
    inputs: dict[ir.Value, None] = {}
    stack = [mask]
    while stack:
        item = stack.pop()
        node = item.producer()
        if node is None:
            if item.is_graph_input():
                inputs[item] = None
        elif node not in nodes:
            nodes[node] = None
            stack.extend(v for v in node.inputs if v is not None)
    return tuple(nodes), tuple(inputs), tuple(v for v in inputs if _is_read(v, nodes))


def _is_read(value: ir.Value, nodes: dict[ir.Node, None]) -> bool:
    users = (use.node for use in value.uses())
    return any(node in nodes and node.op_type not in ("Shape", "Size") for node in users)
