"""Models made to hurt: places outside the folder, damaged tensors, names that print."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import onnx
import onnx.helper as oh
from fuzzing.bombs import doubling, extent, growth
from fuzzing.files import FLOAT, OUTSIDE, Hostile, Special, holding, model_of
from fuzzing.mutations import INTEGERS, STRINGS

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


def beside() -> dict[str, bytes | Special]:
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
    model = holding(tensor, place)
    return Hostile(f"external data: {place} at {location[:40]!r}", model, beside())


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
    model = onnx.ModelProto.FromString(model_of(nodes, held, dims=["N"]))
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
    model = onnx.ModelProto.FromString(model_of(nodes, dims=["N"]))
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
    return Hostile(f"expression {pattern}", model_of(nodes, {"t": array}, dims=["N"]))


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
    return Hostile(f"initializer {dims}", holding(tensor, places_[r.randrange(6)]))


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
