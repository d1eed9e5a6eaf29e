"""Models that are small and would become huge: growth, doubling, depth, width."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import onnx
import onnx.helper as oh
from fuzzing.files import FLOAT, INT64, Hostile, model_of

_SHAPE_USERS: dict[str, Callable[[np.ndarray], tuple[list[onnx.NodeProto], dict]]] = {
    "ConstantOfShape": lambda n: ([oh.make_node("ConstantOfShape", ["n"], ["c"])], {"n": n}),
    "Expand": lambda n: ([oh.make_node("Expand", ["o", "n"], ["c"])], {"n": n, "o": _ONE}),
    "Tile": lambda n: ([oh.make_node("Tile", ["o", "n"], ["c"])], {"n": n[:1], "o": _ONE}),
    "Range": lambda n: (
        [oh.make_node("Range", ["z", "n", "d"], ["c"])],
        {"z": np.int64(0), "n": n[0], "d": np.int64(1)},
    ),
    "float Range": lambda n: (
        [oh.make_node("Range", ["z", "n", "d"], ["c"])],
        {"z": np.float32(0), "n": np.float32(n[0]), "d": np.float32(1e-3)},
    ),
    "Pad": lambda n: (
        [oh.make_node("Pad", ["o", "n"], ["c"])],
        {"n": np.array([n[0], 0]), "o": _ONE},
    ),
    "Resize": lambda n: (
        [oh.make_node("Resize", ["o", "", "", "n"], ["c"])],
        {"n": n[:1], "o": _ONE},
    ),
    "scaled Resize": lambda n: (
        [oh.make_node("Resize", ["o", "", "f"], ["c"])],
        {"f": np.array([1e9], np.float32), "o": _ONE},
    ),
    "OneHot": lambda n: (
        [oh.make_node("OneHot", ["i", "n", "v"], ["c"])],
        {"i": np.zeros(3, np.int64), "n": n[0], "v": np.array([0, 1], np.float32)},
    ),
    "HannWindow": lambda n: ([oh.make_node("HannWindow", ["n"], ["c"])], {"n": n[0]}),
    "outer product": lambda n: (
        [oh.make_node("Mul", ["a", "b"], ["c"])],
        {"a": np.ones((8000, 1), np.float32), "b": np.ones((1, 8000), np.float32)},
    ),
    "outer MatMul": lambda n: (
        [oh.make_node("MatMul", ["a", "b"], ["c"])],
        {"a": np.ones((8000, 1), np.float32), "b": np.ones((1, 8000), np.float32)},
    ),
    "Einsum": lambda n: (
        [oh.make_node("Einsum", ["a", "a", "a"], ["c"], equation="i,j,k->ijk")],
        {"a": np.ones(2000, np.float32)},
    ),
    "Conv": lambda n: (
        [oh.make_node("Conv", ["a", "b"], ["c"], pads=[0, 10**9])],
        {"a": np.ones((1, 1, 4), np.float32), "b": np.ones((1, 1, 1), np.float32)},
    ),
    "ConvTranspose": lambda n: (
        [oh.make_node("ConvTranspose", ["a", "b"], ["c"], strides=[2**30])],
        {"a": np.ones((1, 1, 4), np.float32), "b": np.ones((1, 1, 1), np.float32)},
    ),
    "DFT": lambda n: (
        [oh.make_node("DFT", ["a", "n"], ["c"])],
        {"a": np.ones((1, 4, 1), np.float32), "n": n[0]},
    ),
    "EyeLike": lambda n: (
        [
            oh.make_node("ConstantOfShape", ["n"], ["e"]),
            oh.make_node("EyeLike", ["e"], ["c"]),
        ],
        {"n": n},
    ),
    "RandomNormal": lambda n: (
        [oh.make_node("RandomNormal", [], ["c"], shape=[int(n[0]), 1])],
        {},
    ),
    "SplitToSequence": lambda n: (
        [
            oh.make_node("ConstantOfShape", ["n"], ["e"]),
            oh.make_node("SplitToSequence", ["e"], ["q"], axis=0),
            oh.make_node("ConcatFromSequence", ["q"], ["c"], axis=0),
        ],
        {"n": n[:1]},
    ),
    "NonZero": lambda n: (
        [
            oh.make_node("ConstantOfShape", ["n"], ["e"]),
            oh.make_node("NonZero", ["e"], ["k"]),
            oh.make_node("Cast", ["k"], ["c"], to=FLOAT),
        ],
        {"n": n},
    ),
}

_ONE = np.ones(1, np.float32)


def growth(r: random.Random) -> Hostile:
    """A constant that would be huge if it were computed."""
    size = (10**12, 10**9, 2**40, 2**62, 2**63 - 1, -5, 3 * 10**7)[r.randrange(7)]
    names = list(_SHAPE_USERS)
    name = names[r.randrange(len(names))]
    nodes, held = _SHAPE_USERS[name](np.array([size, 1], np.int64))
    nodes.append(oh.make_node("ReduceSum", ["c"], ["s"], keepdims=0))
    nodes.append(oh.make_node("Cast", ["s"], ["f"], to=FLOAT))
    nodes.append(oh.make_node("Add", ["x", "f"], ["y"]))
    if r.randrange(2) and "n" in held:  # hide the size from shape inference
        held["n0"] = held.pop("n")
        nodes.insert(0, oh.make_node("Identity", ["n0"], ["n1"]))
        nodes.insert(1, oh.make_node("Abs", ["n1"], ["n"]))
    return Hostile(f"growth: {name} {size}", model_of(nodes, held, dims=["M"]))


def doubling(r: random.Random) -> Hostile:
    """Something that doubles, or squares, at every step."""
    steps = (10, 25, 40, 64, 200)[r.randrange(5)]
    way = r.randrange(7)
    held: dict[str, np.ndarray] = {"c0": np.ones(4, np.float32)}
    nodes = []
    if way == 0:
        nodes = [
            oh.make_node("Concat", [f"c{i}", f"c{i}"], [f"c{i + 1}"], axis=0) for i in range(steps)
        ]
    elif way == 1:
        held["two"] = np.array([2], np.int64)
        nodes = [oh.make_node("Tile", [f"c{i}", "two"], [f"c{i + 1}"]) for i in range(steps)]
    elif way == 2:  # integers of a million digits
        held["c0"] = np.array([3, 5], np.int64)
        nodes = [oh.make_node("Mul", [f"c{i}", f"c{i}"], [f"c{i + 1}"]) for i in range(steps)]
        nodes.append(oh.make_node("Cast", [f"c{steps}"], ["f0"], to=FLOAT))
    elif way == 3:  # polynomials of a million terms
        held["one"] = np.array([1], np.int64)
        held.pop("c0")
        nodes = [oh.make_node("Shape", ["x"], ["c0"])]
        for i in range(steps):
            nodes.append(oh.make_node("Mul", [f"c{i}", f"c{i}"], [f"m{i}"]))
            nodes.append(oh.make_node("Add", [f"m{i}", "one"], [f"c{i + 1}"]))
        nodes.append(oh.make_node("Cast", [f"c{steps}"], ["f0"], to=FLOAT))
    elif way == 4:
        nodes = [
            oh.make_node("Concat", [f"c{i}", "x"], [f"c{i + 1}"], axis=0) for i in range(steps)
        ]
    elif way == 5:
        return nested_functions(steps, recursive=False)
    else:
        return nested_functions(steps, recursive=True)
    last = "f0" if way in (2, 3) else f"c{steps}"
    nodes.append(oh.make_node("ReduceMax", [last], ["s"], keepdims=0))
    nodes.append(oh.make_node("Add", ["x", "s"], ["y"]))
    return Hostile(f"doubling {way} x {steps}", model_of(nodes, held, dims=["M"]))


def nested_functions(steps: int, *, recursive: bool) -> Hostile:
    """Each function calls the one before twice; or itself."""
    opsets = [oh.make_opsetid("", 20), oh.make_opsetid("own", 1)]
    functions = []
    for i in range(steps):
        inner = "f0" if recursive and i == 0 else f"f{i - 1}"
        calls = [
            oh.make_node(inner, ["v"], ["u"], domain="own"),
            oh.make_node(inner, ["u"], ["r"], domain="own"),
        ]
        if i == 0 and not recursive:
            calls = [oh.make_node("Neg", ["v"], ["u"]), oh.make_node("Abs", ["u"], ["r"])]
        functions.append(oh.make_function("own", f"f{i}", ["v"], ["r"], calls, opsets))
    nodes = [oh.make_node(f"f{steps - 1}", ["x"], ["y"], domain="own")]
    name = f"{'recursive' if recursive else 'nested'} functions x {steps}"
    return Hostile(name, model_of(nodes, functions=functions, dims=["M"]))


def extent(r: random.Random) -> Hostile:
    """Long chains, deep branches, wide nodes, many attributes."""
    way = r.randrange(10)
    count = (50, 500, 2000)[r.randrange(3)]
    if way <= 3:
        operators = ("Relu", "Identity", "Neg", "Tanh", "Softmax", "Dropout", "Erf", "Sigmoid")
        ops = [operators[r.randrange(len(operators))] for _ in range(r.randrange(1, 4))]
        names = ["x", *(f"v{i}" for i in range(count - 1)), "y"]
        nodes = [oh.make_node(ops[i % len(ops)], [names[i]], [names[i + 1]]) for i in range(count)]
        return Hostile(f"chain of {count} {ops}", model_of(nodes, dims=["N"]))
    if way == 4:
        nodes = [oh.make_node("Shape", ["x"], ["c0"])]
        for i in range(count):
            op = ("Add", "Mul", "Sub", "Div", "Concat", "Max")[r.randrange(6)]
            extra = {"axis": 0} if op == "Concat" else {}
            nodes.append(oh.make_node(op, [f"c{i}", "one"], [f"c{i + 1}"], **extra))
        nodes.append(oh.make_node("Identity", [f"c{count}"], ["y"]))
        held = {"one": np.array([1], np.int64)}
        return Hostile(f"{count} integers", model_of(nodes, held, kind=INT64, dims=["M"]))
    if way == 5:
        depth = (3, 10, 30, 33, 60, 1000)[r.randrange(6)]
        return Hostile(f"branches {depth} deep", deep_branches(depth))
    if way == 6:
        nodes = [oh.make_node("Concat", ["x"] * count, ["y"], axis=0)]
        return Hostile(f"Concat of {count}", model_of(nodes, dims=["M"]))
    if way == 7:
        nodes = [oh.make_node("Split", ["x"], [f"s{i}" for i in range(count)], num_outputs=count)]
        nodes.append(oh.make_node("Sum", [f"s{i}" for i in range(count)], ["y"]))
        return Hostile(f"Split into {count}", model_of(nodes, dims=["M"]))
    if way == 8:
        node = oh.make_node("Relu", ["x"], ["y"])
        for i in range(count):
            node.attribute.append(oh.make_attribute(f"a{i}", i))
        return Hostile(f"{count} attributes", model_of([node], dims=["N"]))
    nodes = [oh.make_node("Add", ["x", f"w{i}"], [f"v{i}"]) for i in range(count)]
    nodes.append(oh.make_node("Sum", [f"v{i}" for i in range(count)], ["y"]))
    held = {f"w{i}": np.full(1, i, np.float32) for i in range(count)}
    return Hostile(f"{count} initializers", model_of(nodes, held, dims=["N"]))


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field: protobuf itself refuses to write what is too deep."""
    size, head = len(content), bytearray()
    for value in (number << 3 | 2, size):
        left = value
        while left > 0x7F:
            head.append(left & 0x7F | 0x80)
            left >>= 7
        head.append(left)
    return bytes(head) + content


def deep_branches(depth: int) -> bytes:
    """If in If in If: GraphProto.node = 1, NodeProto.attribute = 5, AttributeProto.g = 6."""
    result = oh.make_tensor_value_info("z", FLOAT, ["N"]).SerializeToString()
    node = oh.make_node("Relu", ["x"], ["z"]).SerializeToString()
    graph = _field(1, node) + _field(2, b"b") + _field(12, result)
    plain = oh.make_attribute("else_branch", onnx.GraphProto.FromString(graph)).SerializeToString()
    for level in range(depth):
        branch = _field(1, b"then_branch") + _field(6, graph) + b"\xa0\x01\x05"
        head = oh.make_node("If", ["p"], ["y" if level == depth - 1 else "z"]).SerializeToString()
        node = head + _field(5, branch) + _field(5, plain)
        graph = _field(1, node) + _field(2, b"b") + _field(12, result)
    model = onnx.ModelProto.FromString(model_of([], {"p": np.array(True)}, dims=["N"]))
    whole = model.graph.SerializeToString()
    model.ClearField("graph")
    return model.SerializeToString() + _field(7, _field(1, node) + whole)
