"""Loads models without reading their weights, and writes them without holding them.

Weights stay memory-mapped, those inside the ``.onnx`` file too. Everything wrong with a file is a
``ModelError`` of one sentence that starts with the file's name.
"""

from __future__ import annotations

import itertools
import mmap
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from optimizer import model_input, notes, onnx_wire, sparse_input
from optimizer.custom_ops.bodies import restore_bodies
from optimizer.errors import ModelError, OptimizerError, OptionError
from optimizer.hashing import BackgroundHashes, hash_file
from optimizer.model_functions import check_functions
from optimizer.model_tensors import (
    LFS_HEAD,
    check_tensors,
    external_files,
    has_numbers,
    map_external,
    mapped,
)
from optimizer.model_writer import save_model, size_text
from optimizer.proto_text import mend_text

#: How plans of TensorRT begin (``engines.plan``).
_ENGINES = (b"ftrt", b"vtrt")

__all__ = [
    "BackgroundHashes",
    "external_files",
    "hash_file",
    "load_model",
    "save_model",
    "size_text",
]

#: What the libraries below raise on bytes that are protobuf but make no sense.
_DAMAGE = (
    *(TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError),
    AssertionError,
)


def load_model(
    path: str | Path,
    custom_ops: Sequence[str | Path] = (),
    *,
    check_numbers: bool = True,
) -> ir.Model:
    """Load and check a model.

    Args:
        path: An ``.onnx`` file. External data must lie in its folder or below.
        custom_ops: Libraries of custom operators; their presence allows unknown domains.
        check_numbers: Also read all weights once and refuse NaN and infinite ones.

    Raises:
        ModelError: The file is missing, damaged, or not a valid model.
        UnsupportedError: The model is newer than this program.
        MissingDependencyError: An operator of an unknown domain, or a library that does not exist.
    """
    path = Path(path)
    for library in custom_ops:
        if not Path(library).is_file():
            msg = f"--custom-ops: file '{library}' does not exist"
            raise OptionError(msg)
    try:
        _check_file(path)
        model = _read(path)
        model_input.check_versions(model)
        restore_bodies(model)
        check_functions(model)
        model_input.check_wiring(model)
        model_input.sort_nodes(model)
        model_input.check_operators(model, tuple(Path(library) for library in custom_ops))
        check_tensors(model)
        model_input.check_nodes(model)
        if check_numbers:
            model_input.check_numbers(model)
    except OptimizerError as error:
        raise type(error)(f"{path}: {error}") from error
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror or error}"
        raise ModelError(msg) from error
    except _DAMAGE as error:
        reason = str(error).strip().partition("\n")[0][:200]
        msg = f"{path}: is damaged: {reason}; expected a model that onnx.checker accepts"
        raise ModelError(msg) from error
    return model


def _check_file(path: Path) -> None:
    if path.is_dir():
        inside = sorted(item.name for item in path.glob("*.onnx"))
        if (path / "config.json").is_file():
            advice = f"for a Hugging Face folder write hf:{path}"
        elif inside:
            advice = f"it holds {', '.join(inside[:3])}: name the file"
        else:
            advice = "expected an .onnx file"
        msg = f"is a folder; {advice}"
        raise ModelError(msg)
    if not path.exists():
        msg = "there is no such file; expected an .onnx file, hf:FOLDER or package.module:factory"
        raise ModelError(msg)
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for, a device has no end
        msg = "is not a plain file; expected an .onnx file"
        raise ModelError(msg)
    with path.open("rb") as file:
        head = file.read(len(LFS_HEAD))
    if not head:
        msg = "is empty; expected an ONNX model"
        raise ModelError(msg)
    if head == LFS_HEAD:
        msg = "is a Git LFS pointer, not the model itself; fetch it with 'git lfs pull'"
        raise ModelError(msg)
    if head.startswith(_ENGINES):
        msg = "is a TensorRT engine, not a model: 'optimize inspect', check and bench take it;"
        raise ModelError(f"{msg} to optimize, give the ONNX model that it was built from")


def _read(path: Path) -> ir.Model:
    """Parse the structure; large weights become tensors mapped from the file itself."""
    proto, extents = _parse(path)
    if not proto.HasField("graph") or not proto.ir_version:
        msg = "holds no ONNX graph; expected a ModelProto with graph and ir_version"
        raise ModelError(msg)
    mend_text(proto)
    model_input.check_names(proto)
    sparse_input.write_dense(proto)
    try:
        model: ir.Model = ir.from_proto(proto)
    except MemoryError:
        raise
    except Exception as error:  # the library raises whatever the damage leads to
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        msg = f"is not a valid model: {reason[:300]}"
        raise ModelError(msg) from error
    _unify(model)
    notes.drop_unreadable(model)
    map_external(model, path)
    place = path.parent.resolve() / path.name  # must outlive a change of the working directory
    for extent in extents:
        _map_initializer(model.graph.initializers[extent.name], extent, place)
    return model


def _unify(model: ir.Model) -> None:
    """One way to say the same, of those that are about.

    The standard domain has no name; an initializer is of the type of its tensor; a length that may
    vary has no number, where some exporters write -1. Nodes that share a name get one each, because
    ONNX Runtime takes them only so.
    """
    _name_apart(model.graph)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            dims = [None if isinstance(d, int) and d < 0 else d for d in value.shape]
            value.shape = ir.Shape(dims)
    roots: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for root in roots:
        imports = root.opset_imports
        if "ai.onnx" in imports:
            imports.setdefault("", imports.pop("ai.onnx"))
        for node in root.all_nodes():
            if node.domain == "ai.onnx":
                node.domain = ""
        for graph in (root if isinstance(root, ir.Graph) else root.graph, *root.subgraphs()):
            for value in graph.initializers.values():
                tensor = value.const_value
                if tensor is not None and not value.is_graph_input():
                    value.type = ir.TensorType(tensor.dtype)
                    value.shape = ir.Shape(tensor.shape.numpy())


def _name_apart(graph: ir.Graph) -> None:
    taken = {node.name for node in graph.all_nodes()}
    numbers: dict[str, Iterator[int]] = {}
    for node in graph.all_nodes():
        name = node.name
        if not name:
            continue
        if name not in numbers:
            numbers[name] = itertools.count(1)
            continue
        node.name = next(f"{name}_{n}" for n in numbers[name] if f"{name}_{n}" not in taken)


def _parse(path: Path) -> tuple[onnx.ModelProto, list[onnx_wire.Extent]]:
    proto = onnx.ModelProto()
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            memoryview(content) as view,
        ):
            structure, extents = onnx_wire.skeleton(view)
        proto.ParseFromString(structure)
    except (onnx_wire.WireError, DecodeError) as error:
        msg = (
            f"is not an ONNX model, or is cut short ({error}; {path.stat().st_size} bytes); "
            "expected a complete .onnx file"
        )
        raise ModelError(msg) from error
    return proto, extents


def _map_initializer(value: ir.Value, extent: onnx_wire.Extent, path: Path) -> None:
    tensor = value.const_value
    assert tensor is not None  # noqa: S101 - an initializer of the file just read
    if not isinstance(tensor, ir.serde.TensorProtoTensor) or has_numbers(tensor.raw):
        msg = f"initializer '{extent.name}' holds its numbers twice; expected one place"
        raise ModelError(msg)
    if extent.length != tensor.nbytes:
        msg = (
            f"initializer '{extent.name}' {list(tensor.shape)} of type {tensor.dtype.name} holds "
            f"{extent.length} bytes, expected {tensor.nbytes}"
        )
        raise ModelError(msg)
    value.const_value = mapped(path, extent.offset, extent.length, tensor, path.parent)
