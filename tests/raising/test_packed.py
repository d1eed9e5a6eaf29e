from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from rule_case import apply, graph, ops, refuses

from optimizer.raising import packed
from optimizer.raising.columns import start, through
from optimizer.raising.shapes import Shapes

RNG = np.random.default_rng(3)
WEIGHT = RNG.integers(-9, 9, (4, 12)).astype(np.float32)
BIAS = RNG.integers(-9, 9, 12).astype(np.float32)


def numbers(array: np.ndarray) -> str:
    return "{" + ", ".join(str(v) for v in array.reshape(-1)) + "}"


CONSTANTS = (
    f"float[4,12] w = {numbers(WEIGHT)}, float[12] b = {numbers(BIAS)}, "
    "int64[4] heads = {0, 0, 2, 6}, int64[4] wide = {0, 0, 3, 4}, int64[5] all = {0, 0, 3, 2, 2}, "
    "int64[3] sizes = {4, 4, 4}, int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2}, "
    "int64[1] zero = {0}, int64[1] one = {1}, int64[1] four = {4}, int64[1] six = {6}, "
    "int64[1] eight = {8}, int64[1] last = {-1}, int64[1] end = {99}"
)
LAYER = "m = MatMul(x, w)  l = Add(m, b)"


def case(*parts: str, output: str = "float[B,S,4] y", **changes: str) -> ir.Model:
    return graph("  ".join((LAYER, *parts)), constants=CONSTANTS, output=output, **changes)


def layers(model: ir.Model) -> list[tuple[np.ndarray, np.ndarray]]:
    """(weight, bias) of every linear layer."""
    result = []
    for node in model.graph:
        if node.op_type == "MatMul" and node.inputs[1].is_initializer():
            (add,) = node.outputs[0].consumers()
            result.append((node.inputs[1].const_value.numpy(), add.inputs[1].const_value.numpy()))
    return result


def assert_columns(model: ir.Model, *columns: list[int]) -> None:
    found = layers(model)
    assert len(found) == len(columns)
    for (weight, bias), chosen in zip(found, columns, strict=True):
        np.testing.assert_array_equal(weight, WEIGHT[:, chosen])
        np.testing.assert_array_equal(bias, BIAS[chosen])


TOTAL = "s = Mul(q, k)  y = Add(s, v)"
SPLITS = {
    "split in equal parts": "q, k, v = Split<axis = -1, num_outputs = 3>(l)",
    "split by sizes": "q, k, v = Split<axis = 2>(l, sizes)",
    "slices": "q = Slice(l, zero, four, last)  k = Slice(l, four, eight, last)  "
    "v = Slice(l, eight, end, last)",
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_layer_becomes_one_for_each_part_of(name: str) -> None:
    model = case(SPLITS[name], TOTAL)
    assert apply(model, packed.run).applied == 1
    assert_columns(model, [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11])
    assert ops(model) == {"MatMul": 3, "Add": 4, "Mul": 1}


def test_columns_interleaved_per_head_are_gathered() -> None:
    model = case(
        "r = Reshape(l, heads)  t = Transpose<perm = [0, 2, 1, 3]>(r)",
        "q, k, v = Split<axis = 3, num_outputs = 3>(t)",
        TOTAL,
        output="float[B,2,S,2] y",
    )
    apply(model, packed.run)
    assert_columns(model, [0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11])
    assert ops(model)["Transpose"] == 3


def test_parts_chosen_by_index_lose_their_axis() -> None:
    model = case(
        "r = Reshape(l, all)  t = Transpose<perm = [2, 0, 3, 1, 4]>(r)",
        "q = Gather(t, i0)  k = Gather(t, i1)  v = Gather(t, i2)",
        TOTAL,
        output="float[B,2,S,2] y",
    )
    apply(model, packed.run)
    assert_columns(model, [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11])


def test_one_key_and_value_head_beside_many_query_heads_is_split_off() -> None:
    """Some users cut at once, some after a Transpose; their Transposes become one."""
    model = graph(
        f"{LAYER}  r = Reshape(l, grouped)  q = Slice(r, zero, two, two)  "
        "t = Transpose<perm = [2, 0, 1, 3]>(r)  k0 = GatherND(t, n2)  v0 = GatherND(t, n1)  "
        "k = Transpose<perm = [1, 0, 2, 3]>(k0)  v = Transpose<perm = [1, 0, 2, 3]>(v0)  "
        "h = Transpose<perm = [0, 2, 1, 3]>(q)  s = Mul(h, k)  y = Add(s, v)",
        constants=CONSTANTS.replace("one = {1}", "one = {1}, int64[1] two = {2}").replace(
            "int64[4] heads", "int64[4] grouped = {0, 0, 4, 3}, int64[1,1] n1 = {-1}, "
            "int64[1,1] n2 = {-2}, int64[4] heads"
        ),
        output="float[B,2,S,3] y",
    )  # fmt: skip
    apply(model, packed.run)
    assert_columns(model, [0, 1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11])
    perms = [n.attributes["perm"].as_ints() for n in model.graph if n.op_type == "Transpose"]
    assert [list(perm) for perm in perms] == [[0, 2, 1, 3]] * 3


def test_packed_gate_and_up_are_two_layers() -> None:
    model = case("g, u = Split<axis = -1, num_outputs = 2>(l)  a = Sigmoid(g)  y = Mul(a, u)",
                 output="float[B,S,6] y")  # fmt: skip
    apply(model, packed.run)
    assert_columns(model, [0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11])


def test_weights_are_sliced_only_when_read() -> None:
    model = case(SPLITS["split in equal parts"], TOTAL)
    packed.run(model)
    weights = [n.inputs[1].const_value for n in model.graph if n.op_type == "MatMul"]
    assert all(isinstance(weight, ir.LazyTensor) for weight in weights)


REFUSED = {
    "the layer is also read whole": (
        "q, k, v = Split<axis = -1, num_outputs = 3>(l)  z = ReduceSum(l)  s = Add(k, z)  "
        "t = Add(q, v)  y = Mul(s, t)", None,
    ),
    "parts overlap": (
        "q = Slice(l, zero, eight, last)  k = Slice(l, four, end, last)  y = Mul(q, k)", "overlap",
    ),
    "one part is used": ("y = Slice(l, zero, eight, last)", "only a part"),
    "the sequence is cut": (
        "q, k = Split<axis = 1, num_outputs = 2>(l)  y = Concat<axis = 1>(k, q)", None,
    ),
    "parts are joined again": (
        "q = Slice(l, zero, six, last)  k = Slice(l, six, end, last)  n = Neg(k)  "
        "y = Concat<axis = -1>(n, q)", "joined again",
    ),
    "columns alternate": (
        "r = Reshape(l, pairs)  q, k = Split<axis = -1, num_outputs = 2>(r)  y = Mul(q, k)",
        "alternate",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_leaves_alone_when(name: str) -> None:
    nodes, reason = REFUSED[name]
    output = {"parts overlap": "float[B,S,8] y", "one part is used": "float[B,S,8] y",
              "the sequence is cut": "float[B,S,12] y", "parts are joined again": "float[B,S,12] y",
              "columns alternate": "float[B,S,6,1] y"}  # fmt: skip
    model = graph(
        f"{LAYER}  {nodes}",
        constants=CONSTANTS + ", int64[4] pairs = {0, 0, 6, 2}",
        output=output.get(name, "float[B,S,4] y"),
    )
    refuses(model, packed.run, reason)


def test_columns_are_followed_through_any_regrouping() -> None:
    model = graph(
        "a = Reshape(x, s1)  b = Transpose<perm = [0, 3, 1, 2]>(a)  y = Reshape(b, s2)",
        inputs="float[B,S,12] x",
        output="float[B,2,S,2,3] y",
        constants="int64[4] s1 = {0, 0, 6, 2}, int64[5] s2 = {0, 2, -1, 2, 3}",
    )
    columns = start(model.graph.inputs[0], 3, 12)
    shapes = Shapes()
    for node in model.graph:
        following = through(shapes, columns, node)
        assert following is not None
        columns = following
    assert columns.order == (0, None, 1, None, None)
    expected = np.arange(12).reshape(6, 2).T.reshape(2, 2, 3)
    np.testing.assert_array_equal(columns.index, expected)


def test_a_reshape_that_merges_batch_and_sequence_is_not_followed() -> None:
    model = graph(
        "y = Reshape(x, s)", inputs="float[B,S,12] x", output="float[N,12] y",
        constants="int64[2] s = {-1, 12}",
    )  # fmt: skip
    (node,) = model.graph
    assert through(Shapes(), start(model.graph.inputs[0], 3, 12), node) is None


def test_one_number_added_to_all_columns_is_added_to_each_part() -> None:
    model = graph(
        f"m = MatMul(x, w)  l = Add(m, one)  {SPLITS['split in equal parts']}  {TOTAL}",
        constants=f"float[4,12] w = {numbers(WEIGHT)}, float[1] one = {{0.5}}",
    )
    assert apply(model, packed.run).applied == 1
    assert ops(model) == {"MatMul": 3, "Add": 4, "Mul": 1}
    assert len(model.graph.initializers["one"].uses()) == 3
