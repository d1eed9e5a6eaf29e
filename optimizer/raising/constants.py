"""Constants become initializers, and what depends on constants alone is computed now.

Rewrite:      Constant -> initializer; f(constants) -> initializer, f any deterministic operator
Applies when: the result adds no more than ``GROWTH_LIMIT`` bytes to the model, or replaces
              constants that are at least as large; large results stay lazy
Exactness:    as the operator; the numbers come from ONNX's reference implementation
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx import helper
from onnx.reference import ReferenceEvaluator

from optimizer.arrays import contiguous_copy
from optimizer.data_files import note_source
from optimizer.graph import (
    attribute_graphs,
    constant,
    inherit_name,
    lazy,
    release,
    replace_value,
    unique_name,
)
from optimizer.raising.base import RuleReport, allow, attempt, opset_of
from optimizer.raising.shape_rules import slice_bounds
from optimizer.raising.shapes import Shapes

#: Bytes that all folded results together may add.
TOTAL_GROWTH = 1 << 26
#: Bytes one folded result may add. A mask or position table of a short static sequence fits, a
#: weight expanded from a smaller one (dequantized, tiled, widened) does not.
GROWTH_LIMIT = 1 << 16
#: Results up to this size are computed at once, larger ones each time they are read.
EAGER_LIMIT = 1 << 16

#: Only whether there are bounds is asked.
_ANY_RANK = 64
#: A dequantized weight is the point of a quantized model.
_KEEP = frozenset({"Constant", "DequantizeLinear", "Dropout"})
#: Operators that give not much more than they get: these may be tried where the size of the result
#: is not known. What any other gives could fill the memory, or take for ever.
_BOUNDED = frozenset(
    {
        "ArgMax", "ArgMin", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CastLike",
        "Compress", "Concat", "CumSum", "DepthToSpace", "Gather", "GatherElements", "GatherND",
        "Hardmax", "IsInf", "IsNaN", "NonZero", "ReduceL1", "ReduceL2", "ReduceLogSum",
        "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
        "ReduceSumSquare", "Reshape", "ScatterElements", "ScatterND", "Shape", "Size", "Slice",
        "SpaceToDepth", "Split", "Squeeze", "TopK", "Transpose", "Trilu", "Unsqueeze",
    }
)  # fmt: skip
#: Where a graph keeps the bytes that folding has added to it.
_SPENT = "optimize.folded_bytes"
#: Their result is still the same weight, and keeps its name.
_SAME_NUMBERS = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def lift(model: ir.Model) -> RuleReport:
    """Turn ``Constant`` nodes into initializers."""
    return RuleReport(_lift_constants(model.graph, model.graph))


def run(model: ir.Model) -> RuleReport:
    """Compute what depends on constants alone."""
    opset, shapes, graph = opset_of(model), Shapes(), model.graph
    count = 0
    for node in graph:
        if graph.meta.get(_SPENT, 0) < TOTAL_GROWTH and _foldable(node):
            count += attempt(node, _fold, graph, node, opset, shapes)
    return RuleReport(count)


def make_initializer(graph: ir.Graph, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
    """Let an initializer holding ``tensor`` take the place and the name of ``value``."""
    name = value.name or "constant"
    producer = value.producer()
    if producer is not None and producer.graph is not graph:  # names of a branch are its own
        name = unique_name(graph, name)
    value.name = unique_name(graph, f"{name}/folded")
    tensor.name = name
    initializer = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )
    graph.initializers.add(initializer)
    replace_value(value, initializer)
    return initializer


def _lift_constants(root: ir.Graph, graph: ir.Graph) -> int:
    """Constants of subgraphs move to the outermost graph, which is visible from inside."""
    count = 0
    for node in graph:
        for subgraph in attribute_graphs(node):
            count += _lift_constants(root, subgraph)
        if node.op_type != "Constant" or node.domain:
            continue
        output = node.outputs[0]
        tensor = constant(output)
        if tensor is None or output.is_graph_output() or not allow(node):
            continue
        make_initializer(root, output, tensor)
        graph.remove(node, safe=True)
        count += 1
    return count


def _foldable(node: ir.Node) -> bool:
    if node.domain or node.op_type in _KEEP or any(True for _ in attribute_graphs(node)):
        return False
    if any(value is not None and constant(value) is None for value in node.inputs):
        return False
    if node.op_type == "Slice" and slice_bounds(node, _ANY_RANK) is None:
        return False  # numpy, which would compute it, means something else
    return not any(output.is_graph_output() for output in node.outputs)


def _fold(graph: ir.Graph, node: ir.Node, opset: int, shapes: Shapes) -> bool:
    """Replace a node by its results."""
    freed = _freed_bytes(node)
    limit = max(GROWTH_LIMIT, freed)
    size = _result_bytes(node, shapes)
    known = _static_types(node, shapes)
    if size is not None and size > EAGER_LIMIT:
        if size > limit or known is None:
            return False
        tensors: list[ir.TensorProtocol] = [
            _lazy_output(node, index, opset, *known[index]) for index in range(len(node.outputs))
        ]
    else:
        read = sum(tensor.nbytes for v in node.inputs if (tensor := constant(v)) is not None)
        if size is None and (read > EAGER_LIMIT or node.op_type not in _BOUNDED):
            return False
        arrays = evaluate(node, opset)
        if arrays is None or sum(array.nbytes for array in arrays) > limit:
            return False
        if not all(map(_is_finite, arrays)) and all(map(_is_finite, _operands(node))):
            return False  # a model with such constants would be refused as damaged
        tensors = [ir.Tensor(array) for array in arrays]
    made = [
        make_initializer(graph, output, tensor)
        for output, tensor in zip(node.outputs, tensors, strict=True)
    ]
    source = node.inputs[0] if node.inputs else None
    graph.remove(node, safe=True)
    if node.op_type in _SAME_NUMBERS and source is not None:
        inherit_name(graph, source, made[0])
    added = sum(tensor.nbytes for tensor in tensors) - freed
    graph.meta[_SPENT] = graph.meta.get(_SPENT, 0) + max(0, added)
    return True


def _operands(node: ir.Node) -> Iterator[np.ndarray]:
    for value in node.inputs:
        tensor = constant(value)
        if tensor is not None:
            yield tensor.numpy()


def _is_finite(array: np.ndarray) -> bool:
    """Whether no number is infinite or NaN; integers and strings are none of both."""
    floating = array.dtype.kind in "fV" and array.dtype.names is None
    return not floating or bool(np.isfinite(array.astype(np.float64)).all())


def _static_shape(value: ir.Value, shapes: Shapes) -> tuple[int, ...] | None:
    """The shape, where all of it is proven; what a model declares of it may be wrong."""
    shape = shapes.of(value)
    sizes = tuple(dim for dim in shape or () if isinstance(dim, int))
    return sizes if shape is not None and len(sizes) == len(shape) else None


def _result_bytes(node: ir.Node, shapes: Shapes) -> int | None:
    """Bytes of all outputs, None where a shape is not known."""
    total = 0
    for output in node.outputs:
        shape = _static_shape(output, shapes)
        if shape is None:
            return None
        total += _nbytes(output.dtype, shape)
    return total


def _static_types(
    node: ir.Node, shapes: Shapes
) -> list[tuple[ir.DataType, tuple[int, ...]]] | None:
    """Element types and shapes of all outputs, None unless all of them are numbers."""
    known: list[tuple[ir.DataType, tuple[int, ...]]] = []
    for output in node.outputs:
        dtype, shape = output.dtype, _static_shape(output, shapes)
        if shape is None or dtype in (None, ir.DataType.STRING, ir.DataType.UNDEFINED):
            return None
        known.append((ir.DataType(dtype), shape))
    return known


def _nbytes(dtype: ir.DataType | None, shape: tuple[int, ...]) -> int:
    """Bytes of numbers; eight each where their type says nothing about it."""
    known = dtype is not None and dtype not in (ir.DataType.STRING, ir.DataType.UNDEFINED)
    return math.prod(shape) * (dtype.bitwidth if known else 64) // 8  # type: ignore[union-attr]


def _freed_bytes(node: ir.Node) -> int:
    """Bytes of the constants nobody else reads."""
    freed = 0
    for value in dict.fromkeys(node.inputs):
        tensor = constant(value)
        if value is not None and tensor is not None and not value.is_graph_output():
            freed += tensor.nbytes if all(use.node is node for use in value.uses()) else 0
    return freed


def _lazy_output(
    node: ir.Node, index: int, opset: int, dtype: ir.DataType, shape: tuple[int, ...]
) -> ir.LazyTensor:
    frozen = ir.Node(node.domain, node.op_type, (), node.attributes, num_outputs=len(node.outputs))
    tensors = [constant(value) for value in node.inputs]

    def read() -> np.ndarray:
        return _evaluate(frozen, tensors, opset)[index]

    made = lazy(node.outputs[index].name, dtype, shape, read)
    note_source(made, tensors[0] if tensors else None)
    return made


def evaluate(node: ir.Node, opset: int) -> tuple[np.ndarray, ...] | None:
    """The outputs of a node whose inputs are all constants, None if they cannot be computed."""
    try:
        arrays = _evaluate(node, [constant(value) for value in node.inputs], opset)
    except Exception:
        return None
    if not all(isinstance(array, np.ndarray | np.generic) for array in arrays):
        return None
    arrays = tuple(np.asarray(array) for array in arrays)
    wanted = [output.dtype for output in node.outputs]
    if any(d is not None and d.numpy() != a.dtype for d, a in zip(wanted, arrays, strict=True)):
        return None
    return arrays


def _evaluate(
    node: ir.Node, tensors: list[ir.TensorProtocol | None], opset: int
) -> tuple[np.ndarray, ...]:
    names = [f"i{index}" if tensor is not None else "" for index, tensor in enumerate(tensors)]
    outputs = [f"o{index}" for index in range(len(node.outputs))]
    proto = helper.make_node(node.op_type, names, outputs)
    proto.attribute.extend(
        ir.serde.serialize_attribute(attribute) for attribute in node.attributes.values()
    )
    graph = helper.make_graph(
        [proto],
        "fold",
        [helper.make_empty_tensor_value_info(name) for name in names if name],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
    )
    evaluator = ReferenceEvaluator(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    )
    feed = {
        name: tensor.numpy()
        for name, tensor in zip(names, tensors, strict=True)
        if tensor is not None
    }
    with np.errstate(all="ignore"):  # a masked position may well be 0/0
        arrays = tuple(evaluator.run(None, feed))
    views = any(array.base is not None for array in arrays if isinstance(array, np.ndarray))
    if views:  # of a memory map, perhaps
        arrays = tuple(contiguous_copy(array) for array in arrays)
    del feed
    for tensor in tensors:
        if tensor is not None:
            release(tensor)
    return arrays
