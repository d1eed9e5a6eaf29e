"""Damages models: fields of the protobuf by their meaning, and bytes without any."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import onnx
from fuzzing.corpus import Seed, random_seed
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

INTEGERS = (
    0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 23, 24, 25, 127, 128, 255, 1000, 65536, 2**31 - 1, 2**31,
    -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63),
)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-38, 3.4e38, float("inf"), float("-inf"), float("nan"))
STRINGS = (
    "", " ", "x", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "a\nb\nc\nd\ne\nf", "\r", "\0",
    "\u202e",
    "..", "../x", "/etc/passwd", "{0}", "%s", "[bold]", "a" * 5000, "é" * 300, "ai.onnx", "If",
    "optimize.kv_groups", "MatMul", "com.microsoft", "\ud7ff", "9223372036854775808", "nan",
)  # fmt: skip
_INT_TYPES = frozenset(
    {
        FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT64,
        FieldDescriptor.TYPE_UINT32,
    }
)  # fmt: skip


def damaged(r: random.Random) -> Seed:
    """A seed with a few faults."""
    seed = random_seed(r)
    if r.randrange(100) < 25:
        return Seed(seed.name, _bytes(r, seed.model), seed.files)
    model = seed.proto()
    for _ in range(1 if r.randrange(100) < 60 else r.randrange(2, 5)):
        _mutate(r, model)
    try:
        content = model.SerializeToString()
    except Exception:  # a name that is no text any more
        return Seed(seed.name, _bytes(r, seed.model), seed.files)
    if r.randrange(100) < 5:
        content = _bytes(r, content)
    return Seed(seed.name, content, seed.files)


def _bytes(r: random.Random, content: bytes) -> bytes:
    """Bits flipped, pieces cut out, doubled, or put elsewhere."""
    data = bytearray(content)
    for _ in range(r.randrange(1, 4)):
        if not data:
            break
        at = r.randrange(len(data))
        way = r.randrange(7)
        if way == 0:
            data[at] ^= 1 << r.randrange(8)
        elif way == 1:
            data[at] = r.randrange(256)
        elif way == 2:
            del data[at : at + r.randrange(1, 20)]
        elif way == 3:
            data[at:at] = data[at : at + r.randrange(1, 60)]
        elif way == 4:
            del data[at:]
        elif way == 5:
            data[at:at] = bytes(r.randrange(256) for _ in range(r.randrange(1, 9)))
        else:
            data[at : at + 1] = b"\xff\xff\xff\xff\x0f"  # a varint of four billion
    return bytes(data)


def messages(message: Message) -> Iterator[Message]:
    yield message
    for descriptor, value in message.ListFields():
        if descriptor.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in value if descriptor.is_repeated else (value,):
                yield from messages(inner)


def _mutate(r: random.Random, model: onnx.ModelProto) -> None:
    """One fault somewhere; structure more often than the inside of tensors."""
    every = list(messages(model))
    target = every[r.randrange(len(every))]
    if r.randrange(100) < 50:
        kinds = ("NodeProto", "TensorProto", "GraphProto", "AttributeProto", "ValueInfoProto")
        wanted = kinds[r.randrange(len(kinds))]
        fitting = [m for m in every if m.DESCRIPTOR.name == wanted]
        target = fitting[r.randrange(len(fitting))] if fitting else target
    if isinstance(target, onnx.NodeProto) and r.randrange(100) < 40:
        _rewire(r, target, model)
        return
    held = [descriptor for descriptor, _ in target.ListFields()]
    chosen = held if held and r.randrange(100) < 75 else list(target.DESCRIPTOR.fields)
    descriptor = chosen[r.randrange(len(chosen))]
    if descriptor.is_repeated:
        _mutate_list(r, target, descriptor, model)
    else:
        _mutate_field(r, target, descriptor, model)


def _rewire(r: random.Random, node: onnx.NodeProto, model: onnx.ModelProto) -> None:
    """Read or write another value, or be another operator."""
    names = [name for n in model.graph.node for name in (*n.input, *n.output)] or ["x"]
    other = names[r.randrange(len(names))]
    way = r.randrange(5)
    if way == 0 and node.input:
        node.input[r.randrange(len(node.input))] = other
    elif way == 1 and node.output:
        node.output[r.randrange(len(node.output))] = other
    elif way == 2:
        node.input.append(other)
    elif way == 3:
        operators = [n.op_type for n in model.graph.node] + ["Add", "Reshape", "Identity", "If"]
        node.op_type = operators[r.randrange(len(operators))]
    elif node.input:
        node.input[r.randrange(len(node.input))] = ""


def _mutate_field(
    r: random.Random, target: Message, descriptor: FieldDescriptor, model: onnx.ModelProto
) -> None:
    name = descriptor.name
    if r.randrange(100) < 25:
        target.ClearField(name)
        return
    if descriptor.type == FieldDescriptor.TYPE_MESSAGE:
        getattr(target, name).SetInParent()
        return
    value = _value(r, descriptor, getattr(target, name), model)
    try:
        setattr(target, name, value)
    except (ValueError, TypeError):
        target.ClearField(name)


def _mutate_list(
    r: random.Random, target: Message, descriptor: FieldDescriptor, model: onnx.ModelProto
) -> None:
    items: Any = getattr(target, descriptor.name)
    way = r.randrange(6)
    count = len(items)
    if way == 0 and count:
        del items[r.randrange(count)]
    elif way == 1 and count:
        items.append(items[r.randrange(count)])
    elif way == 2 and count > 1:
        order = list(range(count))
        r.shuffle(order)
        copies = list(items)
        if descriptor.type == FieldDescriptor.TYPE_MESSAGE:
            copies = [type(item).FromString(item.SerializePartialToString()) for item in items]
        del items[:]
        items.extend(copies[i] for i in order)
    elif way == 3 and r.randrange(4) == 0:
        del items[:]
    elif descriptor.type == FieldDescriptor.TYPE_MESSAGE:
        items.add()
    elif count and way == 4:
        index = r.randrange(count)
        _set_item(r, items, index, descriptor, model)
    else:
        try:
            items.append(_value(r, descriptor, None, model))
        except (ValueError, TypeError):
            return


def _set_item(
    r: random.Random, items: Any, index: int, descriptor: FieldDescriptor, model: onnx.ModelProto
) -> None:
    try:
        items[index] = _value(r, descriptor, items[index], model)
    except (ValueError, TypeError):
        return


def _value(r: random.Random, descriptor: FieldDescriptor, old: Any, model: onnx.ModelProto) -> Any:
    if descriptor.type in _INT_TYPES or descriptor.type == FieldDescriptor.TYPE_ENUM:
        if isinstance(old, int) and r.randrange(100) < 30:
            return old + (1, -1, 2)[r.randrange(3)]
        small = descriptor.type == FieldDescriptor.TYPE_ENUM or descriptor.name == "data_type"
        return r.randrange(-1, 30) if small else INTEGERS[r.randrange(len(INTEGERS))]
    if descriptor.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return FLOATS[r.randrange(len(FLOATS))]
    if descriptor.type == FieldDescriptor.TYPE_BYTES:
        return _bytes(r, old) if old else bytes(r.randrange(256) for _ in range(r.randrange(9)))
    if descriptor.type == FieldDescriptor.TYPE_STRING:
        names = [name for n in model.graph.node for name in (*n.input, *n.output, n.op_type)]
        if names and r.randrange(100) < 40:
            return names[r.randrange(len(names))]
        return STRINGS[r.randrange(len(STRINGS))]
    return old
