"""What is known of operators in half precision, before any number is looked at.

Products (MatMul, convolutions, attention) are what half precision is for: all runtimes accumulate
them in float32 or can be told to. Normalizations by ``stash_type`` compute their statistics in
float32 whatever their input is. What is named here is different.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.precision.limits import Format
from optimizer.raising.dims import Dim
from optimizer.raising.shapes import Shapes

#: Where the time and the bytes are: these become half precision, what lies between them follows.
PRODUCTS = frozenset({"Attention", "Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})

#: They add up numbers along axes; the runtime chooses the accumulator, often the type itself.
SUMS = frozenset(
    {
        "AveragePool", "GlobalAveragePool", "ReduceL1", "ReduceL2", "ReduceMean", "ReduceSum",
        "ReduceSumSquare",
    }
)  # fmt: skip

_REASONS: dict[str, tuple[str, ...]] = {
    "it computes its statistics in the type of its input": (
        "BatchNormalization", "InstanceNormalization", "LRN", "LpNormalization",
        "MeanVarianceNormalization",
    ),
    "what it adds up grows along its axis": (
        "CumProd", "CumSum", "DFT", "Det", "GRU", "LSTM", "RNN", "ReduceLogSum", "ReduceLogSumExp",
        "ReduceProd", "STFT",
    ),
    "which number it picks hangs on small differences": (
        "ArgMax", "ArgMin", "Ceil", "Floor", "Hardmax", "Mod", "Round", "TopK", "Unique",
    ),
    "it computes places in its input": (
        "AffineGrid", "GridSample", "NonMaxSuppression", "Resize", "RoiAlign", "Upsample",
    ),
    "it draws numbers": (
        "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
        "RandomUniformLike",
    ),
}  # fmt: skip
_KEPT: Mapping[str, str] = {op: reason for reason, ops in _REASONS.items() for op in ops}

#: Results that can be far larger than the input.
_GROWING = frozenset({"Cosh", "Exp", "Pow", "Sinh", "Tan"}) | SUMS
#: Inputs whose relative error counts: they must not be so small that they have lost bits.
_RELATIVE: Mapping[str, int] = {"Div": 1, "Log": 0, "Reciprocal": 0, "Sqrt": 0}

#: Relative errors of the input are multiplied by the size of the input, or of the exponent.
_STEEP = frozenset({"Exp", "Pow"})
_SOFTMAX = frozenset({"LogSoftmax", "Softmax"})


def is_product(node: ir.Node) -> bool:
    """Whether time or weights make a node worth converting for its own sake."""
    if node.domain != "":
        return False
    lookup = node.op_type == "Gather" and graphs.constant(node.inputs[0]) is not None
    return lookup or node.op_type in PRODUCTS


def sensitive_input(node: ir.Node) -> ir.Value | None:
    """The computed input of a node whose relative error goes into the result undiminished."""
    if node.domain != "":
        return None
    index = _RELATIVE.get(node.op_type)
    if node.op_type == "Pow":
        exponent = graphs.scalar(node.inputs[1])
        index = 0 if exponent is None or exponent < 0 else None
    value = None if index is None else node.inputs[index]
    return None if graphs.constant(value) is not None else value


def kept_by_rule(node: ir.Node, format_: Format, shapes: Shapes, *, measured: bool) -> str | None:
    """Why a node keeps its type whatever its numbers, None where numbers may decide.

    Args:
        node: Of the main graph.
        format_: What it would become.
        shapes: Of the model.
        measured: Whether the numbers of a run will be looked at. If not, nodes whose numbers
            could leave the range keep their type.
    """
    if node.domain != "":
        return None
    if node.op_type in _KEPT:
        return _KEPT[node.op_type]
    adds = node.op_type in SUMS or (not format_.overflows and node.op_type in _SOFTMAX)
    if adds:
        terms = _terms(node, shapes)
        if terms is None:
            return f"it adds up an unknown number of terms; {format_.name} holds {format_.terms}"
        if terms > format_.terms:
            return f"it adds up {terms} terms; {format_.name} holds {format_.terms}"
    if not format_.overflows:
        steep = node.op_type in _STEEP
        return "errors of its input are multiplied by the size of it" if steep else None
    return None if measured else _unmeasured(node, format_)


def _unmeasured(node: ir.Node, format_: Format) -> str | None:
    squares = node.op_type == "Mul" and node.inputs[0] is node.inputs[1]
    if node.op_type in _GROWING or squares:
        return f"its result may exceed {format_.largest:g}, and there is no data to tell"
    if sensitive_input(node) is not None:
        return f"its input may be below {format_.tiny:.2g}, and there is no data to tell"
    return None


def _terms(node: ir.Node, shapes: Shapes) -> int | None:
    """How many numbers a node adds up for each of its results; None = not known."""
    shape = shapes.of(node.inputs[0])
    if node.op_type in _SOFTMAX:
        axes: list[int] | None = [node.attributes.get_int("axis", -1)]
    elif node.op_type == "GlobalAveragePool":
        axes = None if shape is None else list(range(2, len(shape)))
    elif node.op_type == "AveragePool":
        return _product(node.attributes.get_ints("kernel_shape", ()))
    else:
        axes = _axes(node)
    if shape is None or axes is None:
        return None
    return _product([shape[axis] for axis in axes] if axes else shape)


def _axes(node: ir.Node) -> list[int] | None:
    """The axes of a reduction, empty = all; None = computed."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is None:
        return list(node.attributes.get_ints("axes", ()))
    numbers = graphs.const(given)
    if numbers is None or not numbers.size:
        return None
    return [int(axis) for axis in numbers.reshape(-1)]


def _product(sizes: Iterable[Dim]) -> int | None:
    total = 1
    for size in sizes:
        if not isinstance(size, int):
            return None
        total *= size
    return total
