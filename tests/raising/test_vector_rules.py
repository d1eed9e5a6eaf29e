"""The numbers in shapes, as they follow from the operators that compute with them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from rule_case import apply, graph, refuses

from optimizer.raising import reshapes
from optimizer.raising.dims import Dim
from optimizer.raising.shapes import Shapes

SIZES = {"B": 2, "S": 5, "T": 3}
INPUTS = "float[B,S,4] x, float[S,T] z"
CONSTANTS = (
    "int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] minus = {-1}, "
    "int64[2] pair = {1, 2}, int64[2] back = {-1, 0}, int64 half = {2}, int64 place = {1}, "
    "int64[1] end = {99}, int64[2] parts = {1, 2}, int64[0] none = {}"
)


def numbers(case: ir.Model, **sizes: int) -> dict[str, np.ndarray]:
    """What every value of the graph is when it runs."""
    proto = ir.to_proto(case)
    del proto.graph.output[:]
    names = [name for node in proto.graph.node for name in node.output]
    proto.graph.output.extend(type(proto.graph.input[0])(name=name) for name in names)
    feed = {
        str(value.name): np.zeros([sizes.get(str(dim), dim) for dim in value.shape], np.float32)
        for value in case.graph.inputs
    }
    return dict(zip(names, ReferenceEvaluator(proto).run(None, feed), strict=True))


def evaluated(dim: Dim, sizes: dict[str, int]) -> int | None:
    """The number that a dimension is; None where a symbol of it has no size."""
    if isinstance(dim, int):
        return dim
    total = 0
    for names, count in dim:
        if any(name not in sizes for name in names):
            return None
        total += count * int(np.prod([sizes[name] for name in names], dtype=np.int64))
    return total


def check(case: ir.Model, **sizes: int) -> None:
    """What is known of vectors is true, and what is the same is the same."""
    found = numbers(case, **sizes)
    shapes, seen = Shapes(), dict[Dim, int]()
    for node in case.graph:
        for value in node.outputs:
            vector, ran = shapes.vector(value), found[str(value.name)]
            if vector is None or ran.dtype.kind not in "iu":
                continue
            assert len(vector) == ran.size, value.name
            for dim, number in zip(vector, ran.reshape(-1).tolist(), strict=True):
                known = evaluated(dim, sizes)
                assert known is None or known == number, (value.name, dim)
                assert seen.setdefault(dim, number) == number, (value.name, dim)


def case(nodes: str, last: str = "v") -> ir.Model:
    ends = f"y = Reshape(x, minus)  w = Identity({last})"
    return graph(f"s = Shape(x)  t = Shape(z)  {nodes}  {ends}", inputs=INPUTS,
                 output="float[N] y, int64[M] w", constants=CONSTANTS)  # fmt: skip


KNOWN = {
    "Shape<start = 1>(x)": ["S", 4],
    "Shape<start = -2, end = -1>(x)": ["S"],
    "Gather(s, back)": [4, "B"],
    "Slice(s, one, end)": ["S", 4],
    "Slice(s, minus, zero, zero, minus)": [4, "S"],
    "Concat<axis = 0>(t, two)": ["S", "T", 2],
    "Mul(t, two)": ["2S", "2T"],
    "Sub(t, one)": ["S-1", "T-1"],
    "Identity(t)": ["S", "T"],
    "ReduceProd(t)": ["ST"],
    "ReduceProd<noop_with_empty_axes = 1>(t)": ["S", "T"],
    "ReduceProd(t, zero)": ["ST"],
    "ReduceProd<noop_with_empty_axes = 1>(t, none)": ["S", "T"],
}


REDUCED = {
    "ReduceMax(x)": (1, 1, 1),
    "ReduceMax<keepdims = 0>(x)": (),
    "ReduceMax(x, none)": (1, 1, 1),
    "ReduceMax<noop_with_empty_axes = 1>(x, none)": ("B", "S", 4),
    "ReduceMax<noop_with_empty_axes = 1>(x)": ("B", "S", 4),
    "ReduceMax<noop_with_empty_axes = 1>(x, minus)": ("B", "S", 1),
    "ReduceMax<keepdims = 0>(x, back)": ("S",),
}


@pytest.mark.parametrize("node", REDUCED)
def test_the_shape_of(node: str) -> None:
    model = graph(f"m = {node}  n = Shape(m)  y = Identity(n)", inputs="float[B,S,4] x",
                  output="int64[N] y", constants=CONSTANTS)  # fmt: skip
    own = Shapes().of(model.graph.inputs[0])
    expected = tuple(own["BS".index(n)] if isinstance(n, str) else n for n in REDUCED[node])
    assert Shapes().of(model.graph[0].outputs[0]) == expected
    ran = [SIZES.get(str(n), n) for n in REDUCED[node]]
    assert numbers(model, **SIZES)["n"].tolist() == ran


def test_a_reduction_over_computed_axes_is_not_known() -> None:
    for more in ("", "<noop_with_empty_axes = 1>"):
        model = graph(f"s = Shape(x)  n = ReduceProd{more}(s, a)  y = Identity(n)",
                      inputs="float[B,S] x, int64[A] a", output="int64[N] y")  # fmt: skip
        product = model.graph[1].outputs[0]
        assert Shapes().of(product) is None
        assert Shapes().vector(product) is None


@pytest.mark.parametrize("node", KNOWN)
def test_numbers_that_follow_from(node: str) -> None:
    model = case(f"v = {node}")
    value = next(n for n in model.graph if n.outputs[0].name == "v").outputs[0]
    sizes = {name: 10 ** (index + 1) for index, name in enumerate("BST")}
    expected = {"2S": 200, "2T": 2000, "S-1": 99, "T-1": 999, "ST": 100_000}
    vector = Shapes().vector(value)
    assert vector is not None
    wanted = [expected.get(str(n), sizes.get(str(n), n)) for n in KNOWN[node]]
    assert [evaluated(dim, sizes) for dim in vector] == wanted
    check(model, **SIZES)


def test_a_split_of_a_vector() -> None:
    model = case("u, v = Split(s, parts)")
    check(model, **SIZES)
    split = next(node for node in model.graph if node.op_type == "Split")
    assert [len(Shapes().vector(part)) for part in split.outputs] == [1, 2]


def test_a_choice_between_minus_one_and_a_size() -> None:
    """As exporters of Expand write it: -1 stands for the size that is there."""
    model = case("g = Concat<axis = 0>(minus, two)  e = Equal(g, minus)  v = Where(e, t, g)")
    value = next(n for n in model.graph if n.op_type == "Where").outputs[0]
    assert Shapes().vector(value) == ((((("S",), 1),)), 2)
    check(model, **SIZES)


@pytest.mark.parametrize("other", ["one", "zero"])
def test_a_size_may_be_any_number_that_is_not_negative(other: str) -> None:
    model = case(f"e = Equal(t, {other})  v = Where(e, t, two)")
    value = next(n for n in model.graph if n.op_type == "Where").outputs[0]
    assert Shapes().vector(value) is None


def test_another_comparison_chooses_otherwise() -> None:
    model = case("g = Concat<axis = 0>(minus, two)  e = Greater(g, minus)  v = Where(e, t, g)")
    value = next(n for n in model.graph if n.op_type == "Where").outputs[0]
    assert Shapes().vector(value) is None


def test_an_exact_quotient_is_known_and_another_has_a_name_of_its_own() -> None:
    model = case("m = Mul(t, two)  a = Div(m, two)  b = Div(t, two)  v = Add(a, b)")
    values = {n.outputs[0].name: n.outputs[0] for n in model.graph}
    shapes = Shapes()
    assert shapes.vector(values["a"]) == shapes.vector(values["t"])
    assert shapes.vector(values["b"]) not in (shapes.vector(values["t"]), None)
    check(model, **SIZES)


def test_the_quotient_of_what_may_be_negative_is_not_known() -> None:
    """As a size, it would be taken for another number than -1."""
    model = case("m = Sub(one, t)  v = Div(m, two)")
    assert Shapes().vector(next(n for n in model.graph if n.op_type == "Div").outputs[0]) is None


def test_a_quotient_of_floats_is_not_its_whole_part() -> None:
    """3.0 / 2.0 * 2.0 is 3, and 3 / 2 * 2 is 2: they must not be merged."""
    model = graph(
        "s = Shape(x)  t = Shape(z)  f = Cast<to = 1>(s)  g = Cast<to = 1>(t)  q = Div(f, g)"
        "  a = Cast<to = 7>(q)  m = Mul(a, t)  n = Mul(q, g)  b = Cast<to = 7>(n)"
        "  h = Sub(b, m)  y = Identity(h)",
        inputs="float[B] x, float[2] z", output="int64[1] y",
    )  # fmt: skip
    apply(model, reshapes.run)


def test_casts_to_small_types_lose_what_is_known() -> None:
    for kind in (3, 9, 10):  # int8, bool, float16
        model = case(f"c = Cast<to = {kind}>(t)  v = Cast<to = 7>(c)")
        value = next(n for n in model.graph if n.outputs[0].name == "v").outputs[0]
        assert Shapes().vector(value) is None


@pytest.mark.parametrize("number", [2**24, 2**24 + 1])
def test_casts_to_float_keep_what_float_holds(number: int) -> None:
    model = graph("c = Cast<to = 1>(n)  v = Cast<to = 7>(c)", inputs="float[B] x",
                  output="int64[1] v", constants=f"int64[1] n = {{{number}}}")  # fmt: skip
    value = next(n for n in model.graph if n.outputs[0].name == "v").outputs[0]
    assert Shapes().vector(value) == ((number,) if number == 2**24 else None)


def test_equal_vectors_are_computed_once_and_known_ones_not_at_all() -> None:
    model = graph(
        "s = Shape(x)  a = Gather(s, back)  t = Shape(x)  b = Gather(t, back)"
        "  c = Slice(t, two, end)  d = Concat<axis = 0>(a, c)  e = Concat<axis = 0>(b, c)"
        "  y = Add(d, e)",
        inputs="float[B,S,4] x", output="int64[3] y", constants=CONSTANTS,
    )  # fmt: skip
    apply(model, reshapes.run)
    assert len([n for n in model.graph if n.op_type == "Shape"]) == 1
    assert len([n for n in model.graph if n.op_type == "Concat"]) == 1


def test_a_vector_that_is_a_graph_output_stays() -> None:
    model = graph("s = Shape(x)  y = Gather(s, minus)", inputs="float[B,S,4] x",
                  output="int64[1] y", constants=CONSTANTS)  # fmt: skip
    refuses(model, reshapes.run, None)


BINARY = ("Add", "Mul", "Sub", "Div")
KINDS = ("binary", "gather", "slice", "concat", "prod", "cast", "where")
NEVER_ZERO = ("s", "t", "one", "two", "pair", "minus")


@st.composite
def programs(draw: st.DrawFn) -> str:
    """A few nodes that compute with the sizes of x and z, all results vectors of int64."""
    lengths = {"s": 3, "t": 2, "one": 1, "two": 1, "minus": 1, "pair": 2}
    nodes: list[str] = []
    for index in range(draw(st.integers(1, 7))):
        name, source = f"n{index}", draw(st.sampled_from(sorted(lengths)))
        length = lengths[source]
        kind = draw(st.sampled_from(KINDS))
        if kind in ("binary", "where"):
            fits = [k for k, n in lengths.items() if n in (1, length)]
            other = draw(st.sampled_from(sorted(fits)))
        if kind == "binary":
            op_type = draw(st.sampled_from(BINARY))
            if op_type == "Div" and other not in NEVER_ZERO:
                op_type = "Add"
            nodes.append(f"{name} = {op_type}({source}, {other})")
        elif kind == "gather":
            place = draw(st.integers(-length, length - 1))
            nodes.append(f"{name}i = Constant<value_ints = [{place}]>()  "
                         f"{name} = Gather({source}, {name}i)")  # fmt: skip
            length = 1
        elif kind == "slice":
            start = draw(st.integers(0, length - 1))
            nodes.append(f"{name}i = Constant<value_ints = [{start}]>()  "
                         f"{name} = Slice({source}, {name}i, end)")  # fmt: skip
            length -= start
        elif kind == "concat" and length <= 3:
            nodes.append(f"{name} = Concat<axis = 0>({source}, one)")
            length += 1
        elif kind == "prod":
            nodes.append(f"{name} = ReduceProd({source})")
            length = 1
        elif kind == "where":
            nodes.append(f"{name}e = Equal({source}, minus)  "
                         f"{name} = Where({name}e, {other}, {source})")  # fmt: skip
        else:
            nodes.append(f"{name}f = Cast<to = 1>({source})  {name} = Cast<to = 7>({name}f)")
        lengths[name] = length
    return "  ".join(nodes)


@given(nodes=programs(), batch=st.integers(1, 3), rows=st.integers(1, 3), size=st.integers(1, 3))
@settings(deadline=None, max_examples=80, derandomize=True)
def test_what_is_known_of_sizes_is_true(nodes: str, batch: int, rows: int, size: int) -> None:
    last = nodes.rpartition("  ")[2].partition(" ")[0]
    check(case(nodes, last), B=batch, S=rows, T=size)
