"""ONNX files at the level of protobuf fields, so that weights never pass through protobuf.

Reading: ``skeleton`` finds where the raw data of each large initializer lies in the file and
returns the rest as a small ModelProto. Writing: ``write_inline`` emits the same wire format with
one tensor in memory at a time. Field numbers are those of ``onnx.proto`` (ModelProto.graph = 7,
GraphProto.initializer = 5, TensorProto: dims 1, data_type 2, name 8, raw_data 9).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, TypeAlias

import onnx
import onnx_ir as ir

_MODEL_GRAPH = 7
_GRAPH_INITIALIZER = 5
_TENSOR_NAME = 8
_TENSOR_RAW_DATA = 9
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5

#: Smaller initializers stay in the protobuf: shapes and axes must be readable there.
INLINE_LIMIT = 1024

Progress: TypeAlias = Callable[[int, int], None]


class WireError(ValueError):
    """The bytes are not a protobuf message; the text says where."""


@dataclass(frozen=True)
class Extent:
    """Where the raw data of an initializer lies in the file.

    Attributes:
        name: Of the initializer.
        offset: First byte, from the start of the file.
        length: Number of bytes.
    """

    name: str
    offset: int
    length: int


def skeleton(buffer: memoryview) -> tuple[bytes, list[Extent]]:
    """Separate a serialized ModelProto into structure and large weights.

    Returns:
        The serialized model without the raw data of its large initializers, and where that data is.

    Raises:
        WireError: The bytes end in the middle of a field, or are not protobuf.
    """
    parts: list[bytes] = []
    extents: list[Extent] = []
    for number, wire_type, tag, start, end in _fields(buffer, 0, len(buffer)):
        if number == _MODEL_GRAPH and wire_type == _LENGTH:
            graph = _graph_skeleton(buffer, start, end, extents)
            parts += [_length_tag(number), _varint(len(graph)), graph]
        else:
            parts.append(bytes(buffer[tag:end]))
    return b"".join(parts), extents


def _graph_skeleton(buffer: memoryview, start: int, end: int, extents: list[Extent]) -> bytes:
    parts: list[bytes] = []
    for number, wire_type, tag, first, last in _fields(buffer, start, end):
        if number != _GRAPH_INITIALIZER or wire_type != _LENGTH or last - first <= INLINE_LIMIT:
            parts.append(bytes(buffer[tag:last]))
            continue
        kept: list[bytes] = []
        name, data = "", None
        for inner, inner_type, inner_tag, a, b in _fields(buffer, first, last):
            if inner == _TENSOR_RAW_DATA and inner_type == _LENGTH and b - a > INLINE_LIMIT:
                data = (a, b - a)
                continue
            if inner == _TENSOR_NAME and inner_type == _LENGTH:
                name = bytes(buffer[a:b]).decode("utf-8", "replace")
            kept.append(bytes(buffer[inner_tag:b]))
        if data is not None:
            extents.append(Extent(name, *data))
        tensor = b"".join(kept)
        parts += [_length_tag(number), _varint(len(tensor)), tensor]
    return b"".join(parts)


def _fields(buffer: memoryview, at: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (number, wire type, start of tag, start of value, end of value) of each field."""
    while at < end:
        tag = at
        key, at = _read_varint(buffer, at, end)
        wire_type = key & 7
        if wire_type == _LENGTH:
            length, at = _read_varint(buffer, at, end)
            stop = at + length
        elif wire_type == _VARINT:
            _, stop = _read_varint(buffer, at, end)
        elif wire_type in (_FIXED32, _FIXED64):
            stop = at + (4 if wire_type == _FIXED32 else 8)
        else:
            msg = f"byte {tag} starts no protobuf field"
            raise WireError(msg)
        if stop > end or key >> 3 == 0:
            problem = "starts no protobuf field" if key >> 3 == 0 else "starts a field cut short"
            msg = f"byte {tag} {problem}"
            raise WireError(msg)
        yield key >> 3, wire_type, tag, at, stop
        at = stop


def _read_varint(buffer: memoryview, at: int, end: int) -> tuple[int, int]:
    result = shift = 0
    while at < end and shift < 70:
        byte = buffer[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return result, at
        shift += 7
    msg = f"a number ending at byte {at} is cut short"
    raise WireError(msg)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _length_tag(number: int) -> bytes:
    return _varint(number << 3 | _LENGTH)


def write_inline(
    proto: onnx.ModelProto,
    tensors: Sequence[ir.TensorProtocol | None],
    file: BinaryIO,
    progress: Progress | None = None,
) -> None:
    """Write a model whose large initializers are streamed instead of serialized.

    Args:
        proto: The model; emptied of its graph.
        tensors: One entry per ``proto.graph.initializer``: the tensor to stream, or None where the
            protobuf holds the data itself.
        file: Open for writing.
        progress: Called with (bytes written, bytes in all) after each tensor.

    Raises:
        ValueError: A tensor wrote another number of bytes than it declared.
    """
    initializers = list(proto.graph.initializer)
    pieces: list[tuple[bytes, ir.TensorProtocol | None]] = []
    for message, tensor in zip(initializers, tensors, strict=True):
        if tensor is None:
            body = message.SerializeToString(deterministic=True)
            pieces.append((_length_tag(_GRAPH_INITIALIZER) + _varint(len(body)) + body, None))
            continue
        message.ClearField("external_data")
        message.ClearField("data_location")
        body = message.SerializeToString(deterministic=True)
        body += _length_tag(_TENSOR_RAW_DATA) + _varint(tensor.nbytes)
        head = _length_tag(_GRAPH_INITIALIZER) + _varint(len(body) + tensor.nbytes) + body
        pieces.append((head, tensor))
    del proto.graph.initializer[:]
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    total = sum(len(head) + (tensor.nbytes if tensor is not None else 0) for head, tensor in pieces)
    file.write(proto.SerializeToString(deterministic=True))
    file.write(_length_tag(_MODEL_GRAPH) + _varint(len(graph) + total) + graph)
    written = 0
    for head, tensor in pieces:
        file.write(head)
        written += len(head)
        if tensor is not None:
            write_tensor(tensor, file)
            written += tensor.nbytes
            if progress is not None:
                progress(written, total)


def write_tensor(tensor: ir.TensorProtocol, file: BinaryIO) -> None:
    """Append the little-endian bytes of one tensor.

    Raises:
        ValueError: The tensor holds another number of bytes than its type and shape say.
    """
    before = file.tell()
    if hasattr(tensor, "tofile"):
        tensor.tofile(file)
    else:
        file.write(tensor.tobytes())
    written = file.tell() - before
    if written != tensor.nbytes:
        msg = f"tensor '{tensor.name}' wrote {written} bytes, its shape needs {tensor.nbytes}"
        raise ValueError(msg)
