"""The spelling that ONNX Runtime's CUDA provider runs fastest, and without leaving the GPU.

ONNX Runtime computes shapes on the host. A number from there that a kernel on the GPU reads like
any other tensor is copied at every run, and a session with such a copy can't be captured as a CUDA
graph, which is most of the time of a model that decodes one token. Where nodes run is what was
observed with 1.31: of 61 exports the rule below tells it for all but an ArgMax.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import node_of, operand
from optimizer.pass_base import Skip
from optimizer.raising.base import allow
from optimizer.raising.shapes import Shapes

#: Inputs that kernels on the GPU take from the host's memory.
_HOST_INPUTS: dict[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,),
    "CumSum": (1,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceSum": (1,),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
}
#: Kernels of 1.31 for float16 that do not exist for bfloat16.
_NO_BFLOAT16 = frozenset({
    "ArgMax", "ArgMin", "BatchNormalization", "Ceil", "ConvTranspose", "Elu", "Equal", "Floor",
    "Greater", "GreaterOrEqual", "InstanceNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log",
    "NonZero", "OneHot", "PRelu", "Pad", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSumSquare", "Resize", "Round",
    "Selu", "Shrink", "ThresholdedRelu",
})  # fmt: skip
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_SHAPES = frozenset({"Shape", "Size"})


def shift_ranges(model: ir.Model) -> int:
    """Write Range(a, b, d) + s as Range(a + s, b + s, d) where s is a number of the host's.

    The numbers are the same, and of integers: the exporters' positions behind a KV cache.
    """
    shapes, host = Shapes(), _on_host(model.graph)
    count = 0
    for node in list(model.graph):
        if node.op_type != "Add" or node.domain != "":
            continue
        for numbers, shift in (tuple(node.inputs), tuple(reversed(node.inputs))):
            turned = node_of(numbers, "Unsqueeze")
            made = node_of(numbers if turned is None else turned.inputs[0], "Range")
            if made is None or shift not in host or shapes.of(shift) not in ((), (1,)):
                continue
            integer = shift.dtype in (ir.DataType.INT64, ir.DataType.INT32)
            if (integer or shapes.vector(shift) is not None) and allow(node, "range"):
                _shift(model.graph, node, made, shift, turned)
                count += 1
            break
    if count:
        graphs.remove_dead(model)
    return count


def _shift(
    graph: ir.Graph, node: ir.Node, made: ir.Node, shift: ir.Value, turned: ir.Node | None
) -> None:
    """Replace ``node``, which adds ``shift`` to a Range, perhaps behind an Unsqueeze."""
    start, limit, delta = made.inputs
    found, scalar = node.outputs[0], ir.Shape(())
    shift = graphs.insert(graph, node, "Squeeze", (shift,), dtype=shift.dtype, shape=scalar)
    moved = [
        graphs.insert(graph, node, "Add", (v, shift), dtype=shift.dtype, shape=scalar)
        for v in (start, limit)
    ]
    inputs = (*moved, delta)
    shape = found.shape if turned is None else made.outputs[0].shape
    new = graphs.insert(graph, node, "Range", inputs, dtype=found.dtype, shape=shape)
    if turned is not None:
        inputs = (new, turned.inputs[1])
        new = graphs.insert(graph, node, "Unsqueeze", inputs, dtype=found.dtype, shape=found.shape)
    graphs.replace_value(found, new, keep_name=True)


def sum_heads(model: ir.Model) -> int:
    """Write the sum over heads as a product with identities on top of each other.

    The kernel that adds along an axis in the middle takes ten times as long (the keys of 32 images
    in ViT-B on an H100: 42 us).
    """
    shapes = Shapes()
    count = 0
    for node in list(model.graph):
        if node.op_type != "ReduceSum" or node.domain != "" or len(node.inputs) < 2:
            continue
        parts, axes = node_of(node.inputs[0], "Reshape"), graphs.const(node.inputs[1])
        shape = shapes.of(node.inputs[0])
        if parts is None or shape is None or axes is None or len(shape) != 4:
            continue
        heads, size = shape[2:]
        joined = operand(parts)
        whole = shapes.of(joined)
        if node.attributes.get_int("keepdims", 1) or axes.tolist() != [2] or whole is None:
            continue
        if not isinstance(heads, int) or not isinstance(size, int):
            continue
        if whole != (*shape[:2], heads * size) or joined.dtype not in _FLOATS:
            continue
        if allow(node, "sum of heads"):
            stacked = np.tile(np.eye(size, dtype=joined.dtype.numpy()), (heads, 1))
            sums = graphs.add_initializer(model.graph, "sum_of_heads", stacked)
            made = graphs.insert(
                model.graph, node, "MatMul", (joined, sums), dtype=joined.dtype,
                shape=node.outputs[0].shape,
            )  # fmt: skip
            graphs.replace_value(node.outputs[0], made, keep_name=True)
            count += 1
    if count:
        graphs.remove_dead(model)
    return count


def widen_bfloat16(model: ir.Model) -> int:
    """Let operators without a kernel for bfloat16 compute in float32, and round what they give.

    ONNX Runtime does so for float16 on its own; a model with such a node in bfloat16 it refuses.
    """
    narrow = ir.DataType.BFLOAT16
    count = 0
    for node in list(model.graph):
        if node.op_type not in _NO_BFLOAT16 or node.domain != "" or len(node.outputs) != 1:
            continue
        if any(v is not None and v.dtype is narrow for v in node.inputs) and allow(
            node, "bfloat16"
        ):
            _in_float(model.graph, node)
            count += 1
    if count:
        graphs.remove_dead(model)
    return count


def _in_float(graph: ir.Graph, node: ir.Node) -> None:
    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT

    def cast(value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return graphs.insert(
            graph, node, "Cast", (value,), {"to": dtype}, name=f"{value.name}_{dtype.name.lower()}",
            dtype=dtype, shape=value.shape,
        )  # fmt: skip

    inputs = [cast(v, wide) if v is not None and v.dtype is narrow else v for v in node.inputs]
    (found,) = node.outputs
    dtype = wide if found.dtype is narrow else found.dtype
    made = graphs.insert(
        graph, node, node.op_type, inputs, node.attributes, dtype=dtype, shape=found.shape
    )
    graphs.carry_notes(node, made)
    new = cast(made, narrow) if found.dtype is narrow else made
    graphs.replace_value(found, new, keep_name=True)


def copies(model: ir.Model) -> Iterator[Skip]:
    """Values that are copied between host and GPU at every run."""
    host = _on_host(model.graph)
    for node in model.graph:
        if node.op_type in _SHAPES or any(value in host for value in node.outputs):
            continue
        slots = _HOST_INPUTS.get(node.op_type, ()) if node.domain == "" else ()
        for index, value in enumerate(node.inputs):
            if value is None or graphs.constant(value) is not None:
                continue
            if (value in host) != (index in slots):
                way = "to the GPU" if value in host else "from the GPU"
                yield Skip(
                    str(node.name),
                    f"its input '{value.name}' is copied {way} at every run, so that ONNX Runtime "
                    "cannot capture the model as a CUDA graph",
                )


def _on_host(graph: ir.Graph) -> set[ir.Value]:
    """What is computed on the host: shapes, and what is made of nothing else."""
    host: set[ir.Value] = set()
    for node in graph:
        if node.domain != "":
            continue
        read = {i: v for i, v in enumerate(node.inputs) if v and graphs.constant(v) is None}
        slots = _HOST_INPUTS.get(node.op_type, ())
        moves = any(i not in slots for i in read) and all(v in host for v in read.values())
        if node.op_type in _SHAPES or moves:
            host.update(node.outputs)
    return host
