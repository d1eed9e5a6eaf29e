"""What an attention mask does to tokens that are merged, found by evaluating it.

The mask's computation is cut out and run with the ONNX reference on batches of one and two. A mask
that hides nothing can be left out; one that hides padding tells which tokens have no size; one that
hides what comes later, perhaps besides padding, holds for fewer tokens too while they keep their
order. Any other mask speaks about single pairs of tokens, and merged tokens have no place in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from optimizer import graph as graphs
from optimizer.nodes import ancestors
from optimizer.raising.dims import Shape
from optimizer.raising.shapes import Shapes

#: Float masks: from here on a score is cut off.
_CUT = -1e4


@dataclass(frozen=True)
class Padding:
    """A mask that hides padding.

    Attributes:
        source: The graph input [B, N], other than 0 where there is a token; None: nothing is
            hidden.
        causal: Whether tokens that come later are hidden, too.
    """

    source: ir.Value | None = None
    causal: bool = False


def read_mask(model: ir.Model, mask: ir.Value | None, count: int) -> Padding | str:
    """What ``mask`` hides from ``count`` tokens, or why it cannot be kept when they are merged."""
    if mask is None:
        return Padding()
    # Of some values only the shape is read.
    nodes, inputs, shaped = ancestors(mask, ("Shape", "Size"))
    if any(True for node in nodes for _ in graphs.attribute_graphs(node)):
        return "its attention mask depends on control flow"
    if len(inputs) > 1:
        return "its attention mask depends on more than one input"
    source = next(iter(inputs), None)
    if source is not None and (source.shape is None or len(source.shape) != 2):
        return f"its attention mask depends on the numbers in input '{source.name}'"
    ends = tuple(dict.fromkeys((*inputs, *shaped)))
    shapes = Shapes()
    sizes = {value: shapes.of(value) for value in ends}
    extracted = ir.convenience.extract(model.graph, ends, [mask])
    extracted.opset_imports.update(model.graph.opset_imports)
    for value in (*extracted.inputs, *extracted.outputs):
        value.shape = None
    try:
        evaluator = ReferenceEvaluator(ir.to_proto(ir.Model(extracted, ir_version=10)))
        found = [_causal(evaluator, sizes, source, count, batch) for batch in (1, 2)]
    except Exception as error:  # the reference raises whatever it likes
        text = " ".join(str(error).split())[:120]
        return f"its attention mask cannot be evaluated ({text})"
    reason = next((text for text in found if isinstance(text, str)), None)
    if reason is None and len(set(found)) > 1:
        reason = "its attention mask is another for each size of the batch"
    return Padding(source, causal=bool(found[0])) if reason is None else reason


def _causal(
    evaluator: ReferenceEvaluator,
    sizes: dict[ir.Value, Shape | None],
    source: ir.Value | None,
    count: int,
    batch: int,
) -> str | bool:
    """Whether the mask hides from real tokens what comes later, besides padding; or what else."""
    valid = np.random.default_rng(batch).integers(0, 2, (batch, count)).astype(bool)
    valid[:, 0] = True
    feed = {str(v.name): _zeros(v, sizes[v], batch) for v in sizes}
    if source is not None:
        feed[str(source.name)] = valid.astype(feed[str(source.name)].dtype)
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
    for causal in (False, True):
        seen = keys & (np.tri(count, dtype=bool) if causal else True)
        if not np.any((attended != seen) & rows):
            return causal
    return "its attention mask hides more than padding and what comes later"


def _zeros(value: ir.Value, shape: Shape | None, batch: int) -> np.ndarray:
    """Zeros of a value whose only unknown size is the batch."""
    if shape is None:
        msg = f"the rank of '{value.name}' is not known"
        raise ValueError(msg)
    sizes = [
        dim if isinstance(dim, int) else sum(n * batch ** len(names) for names, n in dim)
        for dim in shape
    ]
    return np.zeros(sizes, np.float32 if value.dtype is None else value.dtype.numpy())
