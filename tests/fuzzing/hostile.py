"""Models made to hurt: places outside the folder, depth, width, growth, and names that print."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
from fuzzing.mutations import INTEGERS, STRINGS, messages

FLOAT, INT64, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL
#: Stands for the folder beside the model's that must not be touched.
OUTSIDE = "{outside}"


@dataclass(frozen=True)
class Special:
    """A file that is not a plain one.

    Attributes:
        kind: "symlink", "hardlink", "fifo", "folder" or "sparse".
        target: Of a link.
        size: Of a sparse file.
    """

    kind: str
    target: str = ""
    size: int = 0


@dataclass(frozen=True)
class Hostile:
    """One folder with a model in it.

    Attributes:
        name: Of what is tried.
        model: The ``.onnx`` file.
        files: What lies beside it.
    """

    name: str
    model: bytes
    files: Mapping[str, bytes | Special] = field(default_factory=dict)


def aimed(model: bytes, outside: str) -> bytes:
    """The model with the real folder for ``OUTSIDE``."""
    if OUTSIDE.encode() not in model:
        return model
    proto = onnx.ModelProto.FromString(model)
    for message in messages(proto):
        if isinstance(message, onnx.StringStringEntryProto):
            message.value = message.value.replace(OUTSIDE, outside)
    content: bytes = proto.SerializeToString()
    return content


_PLACES = (
    f"{OUTSIDE}/secret.bin", "../outside/secret.bin", "./../outside/secret.bin", "../../secret.bin",
    "sub/../../outside/secret.bin", "link.bin", "linked/secret.bin", "hard.bin", "fifo", "folder",
    "/dev/zero", "/dev/stdin", "/dev/null", "/proc/self/environ", "/proc/self/mem", "/etc/passwd",
    "", ".", "..", "/", "data.bin", "data.bin/", "data.bin/.", "./data.bin", "sub/../data.bin",
    "DATA.BIN", "data.bin\0", "data.bin\0.txt", "\0", "a" * 300, "a/" * 3000,
    "..\\outside\\secret.bin",
    "C:\\outside\\secret.bin", "\\\\server\\share\\x", "file:///etc/passwd", "~/x", "$HOME/x", "-",
    "model.onnx", "data.bin\n", "\x1b[2Jdata", "loop.bin", "huge.bin", "*", "data.bin?x=1",
    "\u202edata", "secret.bin",
)  # fmt: skip
_NUMBERS = (
    "0", "8", "16", "1", "-1", "4", "15", "17", "1e3", "", " ", "x", "0x10", "99999999999999999999",
    "9223372036854775807", "-9223372036854775808", "1_0", "\u0661", "16 ", "+16", "4096", "NaN",
)  # fmt: skip


def _beside() -> dict[str, bytes | Special]:
    return {
        "data.bin": np.arange(4, dtype=np.float32).tobytes(),
        "link.bin": Special("symlink", f"{OUTSIDE}/secret.bin"),
        "linked": Special("symlink", OUTSIDE),
        "hard.bin": Special("hardlink", f"{OUTSIDE}/secret.bin"),
        "loop.bin": Special("symlink", "loop.bin"),
        "fifo": Special("fifo"),
        "folder": Special("folder"),
        "sub": Special("folder"),
        "huge.bin": Special("sparse", size=1 << 26),
    }


def places(r: random.Random) -> Hostile:
    """External data of a tensor anywhere in the model, at a place of any kind."""
    tensor = onnx.TensorProto(name="w", data_type=FLOAT, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    plain = r.randrange(100) < 60
    location = _PLACES[r.randrange(len(_PLACES))] if plain or r.randrange(2) else "data.bin"
    tensor.external_data.add(key="location", value=location)
    for key, usual in (("offset", "0"), ("length", "16")):
        if r.randrange(100) < 70:
            value = usual if plain else _NUMBERS[r.randrange(len(_NUMBERS))]
            tensor.external_data.add(key=key, value=value)
    if r.randrange(10) == 0:
        tensor.external_data.add(key="checksum", value="x")
    if r.randrange(10) == 0:
        again = _PLACES[r.randrange(len(_PLACES))]
        tensor.external_data.add(key="location", value=again)
    if r.randrange(10) == 0:
        tensor.dims[:] = [INTEGERS[r.randrange(len(INTEGERS))]]
    where = ("initializer", "branch", "attribute", "function", "list", "sparse", "unused")
    place = where[r.randrange(len(where))]
    model = _holding(tensor, place)
    return Hostile(f"external data: {place} at {location[:40]!r}", model, _beside())


def _holding(tensor: onnx.TensorProto, place: str) -> bytes:
    """A model x [4] -> y [4] that holds a tensor in one of its places."""
    value = oh.make_tensor_value_info
    nodes, held, sparse, functions = [], [], [], []
    opsets = [oh.make_opsetid("", 18)]
    if place == "initializer":
        held = [tensor]
        nodes = [oh.make_node("Add", ["x", "w"], ["y"])]
    elif place == "unused":
        held = [tensor]
        nodes = [oh.make_node("Relu", ["x"], ["y"])]
    elif place == "attribute":
        nodes = [_constant(tensor), oh.make_node("Add", ["x", "w"], ["y"])]
    elif place == "branch":
        add = oh.make_node("Add", ["x", "w"], ["z"])
        graph = oh.make_graph([add], "t", [], [value("z", FLOAT, [4])], [tensor])
        held = [onh.from_array(np.array(True), "p")]
        nodes = [oh.make_node("If", ["p"], ["y"], then_branch=graph, else_branch=graph)]
    elif place == "function":
        body = [_constant(tensor), oh.make_node("Add", ["v", "w"], ["r"])]
        functions = [oh.make_function("own", "f", ["v"], ["r"], body, opsets)]
        nodes = [oh.make_node("f", ["x"], ["y"], domain="own")]
        opsets = [*opsets, oh.make_opsetid("own", 1)]
    elif place == "list":
        node = oh.make_node("Relu", ["x"], ["y"])
        node.attribute.append(onnx.AttributeProto(name="many", type="TENSORS", tensors=[tensor]))
        nodes = [node]
    else:
        index = onh.from_array(np.arange(4, dtype=np.int64), "w_i")
        sparse = [oh.make_sparse_tensor(tensor, index, [4])]
        nodes = [oh.make_node("Add", ["x", "w"], ["y"])]
    graph = oh.make_graph(
        nodes,
        "g",
        [value("x", FLOAT, [4])],
        [value("y", FLOAT, [4])],
        held,
        sparse_initializer=sparse,
    )
    model = oh.make_model(graph, opset_imports=opsets, functions=functions, ir_version=9)
    content: bytes = model.SerializeToString()
    return content


def _constant(tensor: onnx.TensorProto) -> onnx.NodeProto:
    attribute = onnx.AttributeProto(name="value", type="TENSOR", t=tensor)
    return onnx.NodeProto(op_type="Constant", output=["w"], attribute=[attribute])


def _model(
    nodes: list[onnx.NodeProto],
    held: Mapping[str, np.ndarray] | None = None,
    *,
    dims: list[int | str],
    kind: int = FLOAT,
    functions: list[onnx.FunctionProto] | None = None,
) -> bytes:
    """A model x [N] -> y."""
    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info("x", FLOAT, ["N"])],
        [oh.make_tensor_value_info("y", kind, dims)],
        [onh.from_array(np.asarray(array), name) for name, array in (held or {}).items()],
    )
    opsets = [oh.make_opsetid("", 20), oh.make_opsetid("own", 1)]
    model = oh.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions or [])
    content: bytes = model.SerializeToString()
    return content


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
    return Hostile(f"growth: {name} {size}", _model(nodes, held, dims=["M"]))


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
        return _nested_functions(steps, recursive=False)
    else:
        return _nested_functions(steps, recursive=True)
    last = "f0" if way in (2, 3) else f"c{steps}"
    nodes.append(oh.make_node("ReduceMax", [last], ["s"], keepdims=0))
    nodes.append(oh.make_node("Add", ["x", "s"], ["y"]))
    return Hostile(f"doubling {way} x {steps}", _model(nodes, held, dims=["M"]))


def _nested_functions(steps: int, *, recursive: bool) -> Hostile:
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
    return Hostile(name, _model(nodes, functions=functions, dims=["M"]))


def extent(r: random.Random) -> Hostile:
    """Long chains, deep branches, wide nodes, many attributes."""
    way = r.randrange(10)
    count = (50, 500, 2000)[r.randrange(3)]
    if way <= 3:
        operators = ("Relu", "Identity", "Neg", "Tanh", "Softmax", "Dropout", "Erf", "Sigmoid")
        ops = [operators[r.randrange(len(operators))] for _ in range(r.randrange(1, 4))]
        names = ["x", *(f"v{i}" for i in range(count - 1)), "y"]
        nodes = [oh.make_node(ops[i % len(ops)], [names[i]], [names[i + 1]]) for i in range(count)]
        return Hostile(f"chain of {count} {ops}", _model(nodes, dims=["N"]))
    if way == 4:
        nodes = [oh.make_node("Shape", ["x"], ["c0"])]
        for i in range(count):
            op = ("Add", "Mul", "Sub", "Div", "Concat", "Max")[r.randrange(6)]
            extra = {"axis": 0} if op == "Concat" else {}
            nodes.append(oh.make_node(op, [f"c{i}", "one"], [f"c{i + 1}"], **extra))
        nodes.append(oh.make_node("Identity", [f"c{count}"], ["y"]))
        held = {"one": np.array([1], np.int64)}
        return Hostile(f"{count} integers", _model(nodes, held, kind=INT64, dims=["M"]))
    if way == 5:
        depth = (3, 10, 30, 33, 60, 1000)[r.randrange(6)]
        return Hostile(f"branches {depth} deep", _deep(depth))
    if way == 6:
        nodes = [oh.make_node("Concat", ["x"] * count, ["y"], axis=0)]
        return Hostile(f"Concat of {count}", _model(nodes, dims=["M"]))
    if way == 7:
        nodes = [oh.make_node("Split", ["x"], [f"s{i}" for i in range(count)], num_outputs=count)]
        nodes.append(oh.make_node("Sum", [f"s{i}" for i in range(count)], ["y"]))
        return Hostile(f"Split into {count}", _model(nodes, dims=["M"]))
    if way == 8:
        node = oh.make_node("Relu", ["x"], ["y"])
        for i in range(count):
            node.attribute.append(oh.make_attribute(f"a{i}", i))
        return Hostile(f"{count} attributes", _model([node], dims=["N"]))
    nodes = [oh.make_node("Add", ["x", f"w{i}"], [f"v{i}"]) for i in range(count)]
    nodes.append(oh.make_node("Sum", [f"v{i}" for i in range(count)], ["y"]))
    held = {f"w{i}": np.full(1, i, np.float32) for i in range(count)}
    return Hostile(f"{count} initializers", _model(nodes, held, dims=["N"]))


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


def _deep(depth: int) -> bytes:
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
    model = onnx.ModelProto.FromString(_model([], {"p": np.array(True)}, dims=["N"]))
    whole = model.graph.SerializeToString()
    model.ClearField("graph")
    return model.SerializeToString() + _field(7, _field(1, node) + whole)


def naming(r: random.Random) -> Hostile:
    """Names used twice, names that nobody defines, names that a terminal obeys."""
    odd = STRINGS[r.randrange(len(STRINGS))]
    nodes = [
        oh.make_node("Relu", ["x"], ["a"], "n"),
        oh.make_node("Add", ["a", "w"], ["b"], "n"),
        oh.make_node("Tanh", ["b"], ["y"], "m"),
    ]
    way = r.randrange(14)
    held = {"w": np.ones(1, np.float32)}
    if way == 0:
        nodes[1].output[0] = "a"
    elif way == 1:
        nodes[0].output[0] = "x"
    elif way == 2:
        nodes[0].output[0] = "w"
    elif way == 3:
        nodes[1].input[1] = odd
    elif way == 4:
        nodes.reverse()
    elif way == 5:
        nodes[0].input[0] = "b"
    elif way == 6:
        nodes[1].input[0] = "b"
    elif way == 7:
        nodes[2].name = nodes[0].op_type = odd
    elif way == 8:
        nodes[0].domain = odd
    elif way == 9:
        for node in nodes:
            for names in (node.input, node.output):
                renamed = [odd if name == "a" else name for name in names]
                del names[:]
                names.extend(renamed)
    model = onnx.ModelProto.FromString(_model(nodes, held, dims=["N"]))
    if way == 10:
        model.graph.initializer.append(model.graph.initializer[0])
    elif way == 11:
        model.graph.input.append(model.graph.input[0])
    elif way == 12:
        model.graph.output.append(model.graph.output[0])
    elif way == 13:
        model.graph.input[0].name = odd
    return Hostile(f"names {way} {odd[:20]!r}", model.SerializeToString())


def notes(r: random.Random) -> Hostile:
    """What this project reads from metadata, but not as it writes it."""
    nodes = [oh.make_node("Relu", ["x"], ["y"])]
    model = onnx.ModelProto.FromString(_model(nodes, dims=["N"]))
    keys = ("recipe", "kv_groups", "kv_cache", "group", "bos_token_id", "other")
    values = (
        "", "{", "[]", "null", "1", "-1", '"x"', '{"a": 1}', '{"form": "in-place"}', "NaN", "1e999",
        '{"x": {"layers": null}}', "[" * 3000, '{"buffers": 5, "limits": "x"}', "\x1b[31m",
        "9" * 5000,
    )  # fmt: skip
    for _ in range(r.randrange(1, 4)):
        key = f"optimize.{keys[r.randrange(len(keys))]}"
        value = values[r.randrange(len(values))]
        model.metadata_props.add(key=key, value=value)
        model.graph.node[0].metadata_props.add(key=key, value=value)
    return Hostile("metadata", model.SerializeToString())


def texts(r: random.Random) -> Hostile:
    """Expressions that take exponential time on a constant."""
    pattern = ("(a+)+$", "(a|aa)+$", "([a-z]+)*\\d", "a{1000}{1000}", "(", "\\")[r.randrange(6)]
    array = np.array(["a" * 40 + "!"], dtype=object)
    nodes = [
        oh.make_node("RegexFullMatch", ["t"], ["m"], pattern=pattern),
        oh.make_node("Cast", ["m"], ["f"], to=FLOAT),
        oh.make_node("Add", ["x", "f"], ["y"]),
    ]
    return Hostile(f"expression {pattern}", _model(nodes, {"t": array}, dims=["N"]))


def shapes(r: random.Random) -> Hostile:
    """Initializers whose dimensions lie."""
    dims = [INTEGERS[r.randrange(len(INTEGERS))] for _ in range(r.randrange(0, 4))]
    tensor = onnx.TensorProto(name="w", data_type=r.randrange(0, 27), dims=dims)
    if r.randrange(3):
        tensor.raw_data = bytes(r.randrange(0, 40))
    if r.randrange(3) == 0:
        tensor.float_data.extend([1.0] * r.randrange(0, 9))
    if r.randrange(3) == 0:
        tensor.int32_data.extend([1] * r.randrange(0, 9))
    if r.randrange(4) == 0:
        tensor.string_data.extend([b"\xff\xfe"] * r.randrange(1, 4))
    if r.randrange(6) == 0:
        tensor.segment.begin, tensor.segment.end = 0, 10
    places_ = ("initializer", "attribute", "branch", "sparse", "unused", "function")
    return Hostile(f"initializer {dims}", _holding(tensor, places_[r.randrange(6)]))


#: Family -> how often it is drawn.
FAMILIES: dict[Callable[[random.Random], Hostile], int] = {
    places: 30,
    growth: 14,
    doubling: 8,
    extent: 8,
    naming: 12,
    notes: 6,
    texts: 2,
    shapes: 20,
}


def hostile(r: random.Random) -> Hostile:
    """One of all of them."""
    families, weights = zip(*FAMILIES.items(), strict=True)
    total = r.randrange(sum(weights))
    for family, weight in zip(families, weights, strict=True):
        total -= weight
        if total < 0:
            made: Hostile = family(r)
            return made
    return places(r)
