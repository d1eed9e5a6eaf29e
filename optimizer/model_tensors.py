"""Where the tensors of a model are, and whether their numbers are all there.

Every tensor of a file is looked at: initializers, those in attributes, in branches, and in the
bodies of functions. A place outside of the model's folder is refused wherever it stands.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from optimizer.errors import ModelError

#: How a Git LFS pointer begins, which stands in a folder where the file itself was not fetched.
LFS_HEAD = b"version https://git-lfs.github.com/spec/"

#: Where a protobuf tensor holds numbers that are not bytes, by element type, and how many numbers
#: make up one element.
_FIELDS = {
    ir.DataType.FLOAT: ("float_data", 1),
    ir.DataType.COMPLEX64: ("float_data", 2),
    ir.DataType.DOUBLE: ("double_data", 1),
    ir.DataType.COMPLEX128: ("double_data", 2),
    ir.DataType.INT64: ("int64_data", 1),
    ir.DataType.UINT32: ("uint64_data", 1),
    ir.DataType.UINT64: ("uint64_data", 1),
    ir.DataType.STRING: ("string_data", 1),
}


@dataclass(frozen=True)
class Held:
    """A tensor and its place in the model.

    Attributes:
        name: Of the tensor, or of what holds it.
        tensor: As it is now.
        replace: Puts another in its place.
        initializer: The value of which it is the constant; None in an attribute.
    """

    name: str
    tensor: ir.TensorProtocol
    replace: Callable[[ir.TensorProtocol], None]
    initializer: ir.Value | None = None


def held_tensors(model: ir.Model) -> Iterator[Held]:
    """Every tensor of a model, in an order that does not depend on what is replaced."""
    roots = [model.graph, *(function.graph for function in model.functions.values())]
    for root in roots:
        for graph in (root, *root.subgraphs()):
            for value in list(graph.initializers.values()):
                if value.const_value is not None:
                    yield Held(str(value.name), value.const_value, _setter(value), value)
        for node in root.all_nodes():
            for attribute in list(node.attributes.values()):
                yield from _in_attribute(node, attribute)


def _setter(value: ir.Value) -> Callable[[ir.TensorProtocol], None]:
    def put(tensor: ir.TensorProtocol) -> None:
        value.const_value = tensor

    return put


def _in_attribute(node: ir.Node, attribute: ir.Attr) -> Iterator[Held]:
    if attribute.is_ref():
        return
    name = attribute.name
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()

        def put(new: ir.TensorProtocol) -> None:
            node.attributes[name] = ir.AttrTensor(name, new)

        yield Held(tensor.name or name, tensor, put)
    elif attribute.type == ir.AttributeType.TENSORS:
        for index, tensor in enumerate(attribute.as_tensors()):

            def put_item(new: ir.TensorProtocol, index: int = index) -> None:
                items = list(node.attributes[name].as_tensors())
                items[index] = new
                node.attributes[name] = ir.AttrTensors(name, items)

            yield Held(tensor.name or name, tensor, put_item)


def check_tensors(model: ir.Model) -> None:
    """The numbers of every tensor fit its type and shape.

    Raises:
        ModelError: Missing or extra numbers, a negative dimension, an unknown type.
    """
    for held in held_tensors(model):
        tensor = held.tensor
        _check_type(held.name, tensor)
        if isinstance(tensor, ir.serde.TensorProtoTensor):
            _check_content(held.name, tensor)
        elif isinstance(tensor, ir.StringTensor) and len(tensor.raw) != tensor.size:
            _refuse_count(held.name, tensor, len(tensor.raw), tensor.size, "strings")


def _check_type(name: str, tensor: ir.TensorProtocol) -> None:
    if any(dim < 0 for dim in tensor.shape.numpy()):
        msg = f"tensor '{name}' has shape {_shown(tensor)}; expected no negative dimension"
        raise ModelError(msg)
    if tensor.dtype == ir.DataType.UNDEFINED:
        msg = f"tensor '{name}' {_shown(tensor)} has no element type"
        raise ModelError(msg)


def has_numbers(raw: onnx.TensorProto) -> bool:
    """Whether a protobuf tensor holds numbers itself, in any of its fields."""
    return bool(_filled(raw))


def _filled(raw: onnx.TensorProto) -> list[str]:
    """The fields of a protobuf tensor that hold numbers."""
    names = dict.fromkeys(["int32_data", *(name for name, _ in _FIELDS.values())])
    filled = [name for name in names if len(getattr(raw, name))]
    return [*filled, "raw_data"] if raw.HasField("raw_data") else filled


def _check_content(name: str, tensor: ir.serde.TensorProtoTensor) -> None:
    raw: onnx.TensorProto = tensor.raw
    if raw.HasField("segment"):
        msg = f"tensor '{name}' is stored in segments, which no program writes any more"
        raise ModelError(msg)
    filled = _filled(raw)
    if len(filled) > 1:
        msg = f"tensor '{name}' holds numbers in {' and '.join(filled)}, expected one of them"
        raise ModelError(msg)
    if raw.HasField("raw_data"):
        if len(raw.raw_data) != tensor.nbytes:
            _refuse_count(name, tensor, len(raw.raw_data), tensor.nbytes, "bytes")
        return
    field, width = _FIELDS.get(tensor.dtype, ("int32_data", 1))
    elements = tensor.size
    if tensor.dtype.bitwidth < 8:  # several share a number
        elements = -(-elements * tensor.dtype.bitwidth // 8)
    held = len(getattr(raw, field))
    if held != elements * width:
        _refuse_count(name, tensor, held, elements * width, "numbers")


def _refuse_count(name: str, tensor: ir.TensorProtocol, held: int, wanted: int, what: str) -> None:
    msg = (
        f"initializer '{name}' of shape {_shown(tensor)} and type {tensor.dtype.name} holds "
        f"{held} {what}, expected {wanted}"
    )
    raise ModelError(msg)


def _shown(tensor: ir.TensorProtocol) -> list[int]:
    return [int(dim) for dim in tensor.shape.numpy()]


def belongs(file: Path, model: Path) -> bool:
    """Whether a model may have its data in a file: one in its folder, or below.

    Or beside the file that its own path is a link to: caches of downloads keep files elsewhere,
    side by side, and link to each of them.

    Args:
        file: Resolved.
        model: Path of the model as the user gave it.
    """
    return file.is_relative_to(model.parent.resolve()) or file.parent == model.resolve().parent


def map_external(model: ir.Model, path: Path) -> None:
    """Check the place of every external tensor, and map it from there.

    What is no initializer of the main graph is read into memory: nobody who evaluates a node looks
    for files.

    Args:
        model: As read; its external initializers become mapped ones.
        path: Of the model's file. The data lies in its folder or below, see ``belongs``.

    Raises:
        ModelError: A place outside of the folder, a file that is missing or too short.
    """
    sizes: dict[str, int] = {}
    folder = path.parent.resolve()  # the tensors must outlive a change of the working directory
    for held in held_tensors(model):
        tensor = held.tensor
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location, offset, length = str(tensor.location), tensor.offset or 0, tensor.length
        if location not in sizes:
            sizes[location] = _check_data_file(location, path, held.name)
        _check_type(held.name, tensor)
        if tensor.dtype == ir.DataType.STRING:
            msg = f"tensor '{held.name}' holds strings, which cannot be external data"
            raise ModelError(msg)
        if offset < 0 or (length is not None and length != tensor.nbytes):
            msg = (
                f"external data of '{held.name}' is {length} bytes from {offset} on, its type and "
                f"shape need {tensor.nbytes}"
            )
            raise ModelError(msg)
        if offset + tensor.nbytes > sizes[location]:
            msg = (
                f"external data '{location}' is cut short: '{held.name}' needs bytes {offset} to "
                f"{offset + tensor.nbytes}, the file has {sizes[location]}; copy it again"
            )
            raise ModelError(msg)
        found: ir.TensorProtocol = mapped(folder / location, offset, tensor.nbytes, tensor, folder)
        own = held.initializer
        if own is None or model.graph.initializers.get(held.name) is not own:
            found = in_memory(found)
        held.replace(found)


def mapped(
    path: Path, offset: int, length: int, like: ir.TensorProtocol, folder: Path
) -> ir.ExternalTensor:
    """A tensor like another, with its bytes in a file.

    A file with several hard links is refused by ExternalTensor when it knows a base folder: who
    may write there could have linked a foreign file. We check containment ourselves, and a hard
    link is how several package managers and caches store a file twice.
    """
    real = path.resolve()
    inside = real.is_relative_to(folder.resolve()) and real.stat().st_nlink == 1
    return ir.ExternalTensor(
        location=str(path.relative_to(folder)) if inside else str(real),
        offset=offset,
        length=length,
        dtype=like.dtype,
        shape=ir.Shape(like.shape.numpy()),
        name=like.name or "",
        doc_string=like.doc_string,
        base_dir=folder if inside else "",
    )


def in_memory(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A copy that needs no file."""
    array = np.array(tensor.numpy(), copy=True)
    shape = ir.Shape(tensor.shape.numpy())
    return ir.Tensor(array, dtype=tensor.dtype, shape=shape, name=tensor.name)


def _check_data_file(location: str, model: Path, name: str) -> int:
    """Size of an external data file that exists and belongs to the model.

    Nothing is opened before it is certain where it lies and that it is a plain file: to open a
    pipe would wait for ever.
    """
    if not location or Path(location).is_absolute():
        msg = (
            f"initializer '{name}' names external data '{location}'; expected a path relative to "
            "the model's folder"
        )
        raise ModelError(msg)
    folder = model.parent.resolve()
    data = folder / location
    try:
        real = data.resolve()
        link, found = data.is_symlink(), real.stat() if real.exists() else None
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, links in a circle
        reason = getattr(error, "strerror", None) or str(error)
        msg = f"external data '{location}' of initializer '{name}' cannot be found: {reason}"
        raise ModelError(msg) from error
    within = Path(os.path.normpath(data)).is_relative_to(folder)
    if not within or not belongs(real, model):
        how = "is a link to" if link else "points to"
        msg = (
            f"external data '{location}' {how} '{real}', outside of the model's folder; expected "
            "the data beside the model, so copy it there"
        )
        raise ModelError(msg)
    if found is None:
        msg = (
            f"external data '{location}' of initializer '{name}' is missing in {folder}; copy it "
            "there together with the model"
        )
        raise ModelError(msg)
    if not stat.S_ISREG(found.st_mode):
        msg = f"external data '{location}' of initializer '{name}' is not a plain file"
        raise ModelError(msg)
    with real.open("rb") as file:
        if file.read(len(LFS_HEAD)) == LFS_HEAD:
            msg = f"external data '{location}' is a Git LFS pointer; fetch it with 'git lfs pull'"
            raise ModelError(msg)
    return found.st_size


def external_files(model: ir.Model) -> tuple[Path, ...]:
    """Every file the model's weights are mapped from, in order of first use."""
    tensors = (held.tensor for held in held_tensors(model))
    return tuple(
        {Path(t.path).resolve(): None for t in tensors if isinstance(t, ir.ExternalTensor)}
    )
