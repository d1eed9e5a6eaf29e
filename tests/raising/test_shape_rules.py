"""The shape that each operator's rule gives is the one that the operator gives."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from rule_case import model

from optimizer.raising.dims import Dim
from optimizer.raising.shapes import Shapes

SIZES = {"B": 2, "S": 5}
INPUTS = (
    "float[B,S,4] x, float[4,3] w, float[B,3,6,6] c, float[S] v, int64[B,2] i, float[B,S,1] o, "
    "int64[B,2,4] j, bool[S,1] e, int64[3] given, float[2,3] t, float[4,4] square"
)
CONSTANTS = (
    "float[2,3,3,3] k = {" + ", ".join("1" * 54) + "}, int64[1] one = {1}, int64[1] two = {2}, "
    "int64[1] last = {-1}, int64[1] zero = {0}, int64[2] pair = {0, 2}, int64 n = {2}, "
    "int64[2] sizes = {1, 3}, int64[3] target = {0, -1, 2}, int64[3] wide = {2, 1, 4}, "
    "int64[4] deep = {3, 1, 1, 1}, int64[3] counts = {1, 2, 1}, "
    "int64[2,2] places = {0, 1, 1, 0}, int64[1,1] place = {1}, int64 i0 = {0}, int64 i1 = {1}, "
    "int64[2] ends = {-1, 3}, int64[2] starts = {0, -3}, int64[2] axes = {1, -1}, "
    "float[4] v4 = {1, 2, 3, 4}, int64[6] around = {0, 1, 0, 0, 2, 1}, "
    "float[2,2,4] ones = {" + ", ".join("1" * 16) + "}, float[1,3] two_rows = {1, 2, 3}"
)
#: node text -> the shape, or None where a size of it is not known
KNOWN = {
    "MatMul(x, w)": "BS3",
    "Transpose(x)": "4SB",
    "Transpose<perm = [1, 0, 2]>(x)": "SB4",
    "Unsqueeze(x, pair)": "1B1S4",
    "Unsqueeze(x, last)": "BS41",
    "Squeeze(o, last)": "BS",
    "Flatten(c)": None,
    "Flatten<axis = 0>(w)": "1T",
    "Concat<axis = -2>(x, x)": None,
    "Concat<axis = -1>(x, o)": "BS5",
    "Gather<axis = 1>(x, i)": "BB24",
    "Gather<axis = -1>(x, i0)": "BS",
    "GatherND(x, places)": "24",
    "GatherND(x, place)": "1S4",
    "GatherND<batch_dims = 1>(x, i)": None,
    "Slice(x, zero, two, last)": "BS2",
    "Slice(x, one, last, two)": "BS2",
    "Slice(c, starts, ends, axes)": None,
    "Slice(x, last, zero, last, last)": "BS3",
    "Slice(x, zero, two, one)": None,
    "Expand(x, deep)": "3BS4",
    "Expand(o, wide)": None,
    "Tile(x, counts)": None,
    "Reshape(x, target)": None,
    "Where(e, x, o)": "BS4",
    "Add(x, o)": "BS4",
    "Add(x, v4)": "BS4",
    "Conv(c, k)": "B244",
    "Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(c, k)": "B233",
    "Conv<dilations = [2, 2]>(c, k)": "B222",
    'Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>(c, k)': "B233",
    'Conv<auto_pad = "VALID">(c, k)': "B244",
    "MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(c)": "B333",
    "Split<axis = -1, num_outputs = 2>(x)": "BS2",
    "Split<axis = 2>(x, sizes)": "BS1",
    "Split<axis = 1, num_outputs = 1>(x)": None,
    "Gemm<transB = 1>(w, t)": "42",
    "Gemm<transA = 1>(w, w)": "33",
    "ReduceSum(x, last)": "BS1",
    "ReduceSum<keepdims = 0>(x, pair)": "S",
    "CumSum(x, i1)": "BS4",
    "Softmax(x)": "BS4",
    "Range(i0, n, i1)": "2",
    "ConstantOfShape(counts)": "121",
    "Shape(x)": "3",
    "GatherElements<axis = 1>(x, j)": "B24",
    "Attention<q_num_heads = 2, kv_num_heads = 2>(x, x, x)": "BS4",
    "Attention(c, c, c)": "B366",
    "LayerNormalization(x, v4)": "BS4",
    "TopK<axis = 1>(x, two)": "B24",
    "TopK(x, one)": "BS1",
    "Pad(w, deep)": "85",
    "Pad(x, around)": None,
    "ScatterElements<axis = 1>(x, j, ones)": "BS4",
    "ScatterND(w, place, two_rows)": "43",
}
UNKNOWN = (
    "Squeeze(o)", "AveragePool<kernel_shape = [3, 3], ceil_mode = 1>(c)", "MatMul(v, x)",
    "Expand(x, given)", "Det(square)", "Pad(w, given)",
)  # fmt: skip
NUMBERS = {"T": 12}


def case(node: str) -> ir.Model:
    kind = "int64" if node.startswith(("Range", "Shape")) else "float"
    two = node.startswith("TopK") or ("Split" in node and "= 1>" not in node)
    outputs = "r, r2" if two else "r"
    return model(
        f"g ({INPUTS}) => ({kind}[N] y) <{CONSTANTS}>"
        f" {{ {outputs} = {node}  y = Reshape(r, last) }}"
    )


def size(dim: Dim) -> int | None:
    if isinstance(dim, int):
        return dim
    if any(name not in SIZES for names, _ in dim for name in names):
        return None
    return sum(count * int(np.prod([SIZES[name] for name in names])) for names, count in dim)


def ran(graph_case: ir.Model) -> tuple[int, ...]:
    """The shape of r when the graph runs."""
    proto = ir.to_proto(graph_case)
    del proto.graph.output[:]
    proto.graph.output.append(type(proto.graph.input[0])(name="r"))
    feed = {}
    for value in graph_case.graph.inputs:
        shape = [SIZES.get(str(dim), dim) for dim in value.shape]
        feed[value.name] = np.zeros(shape, value.dtype.numpy())
    return tuple(ReferenceEvaluator(proto).run(None, feed)[0].shape)


@pytest.mark.parametrize("node", KNOWN)
def test_the_shape_of(node: str) -> None:
    made = case(node)
    found = Shapes().of(made.graph[0].outputs[0])
    actual = ran(made)
    assert found is not None
    assert len(found) == len(actual)
    sizes = [size(dim) for dim in found]
    assert all(known in (None, real) for known, real in zip(sizes, actual, strict=True))
    expected = KNOWN[node]
    if expected is not None:
        assert None not in sizes
        named = {**SIZES, **NUMBERS}
        assert actual == tuple(named.get(letter) or int(letter) for letter in expected)


@pytest.mark.parametrize("node", UNKNOWN)
def test_no_shape_is_guessed_of(node: str) -> None:
    assert Shapes().of(case(node).graph[0].outputs[0]) is None
