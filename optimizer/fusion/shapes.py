"""The one shape the algebra depends on: whether a mask is the same for all heads."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from optimizer.proto import skeleton

_META_KEY = "optimizer.fusion.mask_heads"


def mask_heads(mask: ir.Value | None) -> int | None:
    """Size of the head axis of an attention mask.

    Returns:
        1 where all heads share the mask (or there is none); None where it is not known.
    """
    if mask is None:
        return 1
    if _META_KEY not in mask.meta:
        mask.meta[_META_KEY] = _head_axis(mask)
    heads = mask.meta[_META_KEY]
    return heads if isinstance(heads, int) else None


def _head_axis(mask: ir.Value) -> int | None:
    dims = _known(mask.shape)
    if dims is None or (len(dims) > 2 and dims[-3] is None):
        dims = _inferred(mask)
    if dims is None:
        return None
    return 1 if len(dims) < 3 else dims[-3]


def _known(shape: ir.Shape | None) -> list[int | None] | None:
    return None if shape is None else [d if isinstance(d, int) else None for d in shape]


def _inferred(mask: ir.Value) -> list[int | None] | None:
    """Shape inference over the whole graph; exporters leave masks without a shape."""
    node = mask.producer()
    graph = None if node is None else node.graph
    if not isinstance(graph, ir.Graph):
        return None
    # 10 is the IR version of the oldest release that knows opset 23's predecessor; inference does
    # not look at it.
    proto, _ = skeleton(ir.Model(graph, ir_version=10), outputs=[mask])
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return None
    tensor = inferred.graph.output[0].type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
