"""Loads models without reading their weights, and writes them without holding them.

Weights stay memory-mapped, those inside the ``.onnx`` file too. Everything wrong with a file is a
``ModelError`` of one sentence that starts with the file's name.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from optimizer import model_input, onnx_wire
from optimizer.errors import ModelError, OptimizerError, OptionError
from optimizer.model_writer import save_model, size_text

__all__ = [
    "BackgroundHashes",
    "external_files",
    "hash_file",
    "load_model",
    "save_model",
    "size_text",
]

#: What the libraries below raise on bytes that are protobuf but make no sense.
_DAMAGE = (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError)
_LFS_HEAD = b"version https://git-lfs.github.com/spec/"


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as hex digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class BackgroundHashes:
    """SHA-256 of files, computed by a thread while the caller does something else."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._digests: dict[Path, str] = {}
        self._paths = tuple(dict.fromkeys(paths))
        # A daemon, so that an interrupted program does not wait for it.
        self._thread = threading.Thread(target=self._compute, daemon=True)
        self._thread.start()

    def _compute(self) -> None:
        for path in self._paths:
            with contextlib.suppress(OSError):  # reported by ``items``, which tries again
                self._digests[path] = hash_file(path)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, in order."""
        return self._paths

    def items(self) -> list[tuple[Path, str]]:
        """(file, digest) of each file, in order; waits for the thread.

        Raises:
            OSError: A file cannot be read any more.
        """
        self._thread.join()
        return [(path, self._digests.get(path) or hash_file(path)) for path in self._paths]


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
    _check_file(path)
    try:
        model = _read(path)
        model_input.check_versions(model)
        model_input.check_wiring(model)
        model_input.sort_nodes(model)
        model_input.check_operators(model, tuple(Path(library) for library in custom_ops))
        model_input.check_tensors(model)
        _check_external(model, path)
        if check_numbers:
            model_input.check_numbers(model)
    except OptimizerError as error:
        raise type(error)(f"{path}: {error}") from error
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
        msg = f"{path}: is a folder; {advice}"
        raise ModelError(msg)
    if not path.exists():
        msg = (
            f"{path}: there is no such file; expected an .onnx file, hf:FOLDER or "
            "package.module:factory"
        )
        raise ModelError(msg)
    try:
        with path.open("rb") as file:
            head = file.read(len(_LFS_HEAD))
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}"
        raise ModelError(msg) from error
    if not head:
        msg = f"{path}: is empty; expected an ONNX model"
        raise ModelError(msg)
    if head == _LFS_HEAD:
        msg = f"{path}: is a Git LFS pointer, not the model itself; fetch it with 'git lfs pull'"
        raise ModelError(msg)


def _read(path: Path) -> ir.Model:
    """Parse the structure; large weights become tensors mapped from the file itself."""
    proto = onnx.ModelProto()
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            structure, extents = onnx_wire.skeleton(view)
        proto.ParseFromString(structure)
    except (onnx_wire.WireError, DecodeError) as error:
        msg = (
            f"is not an ONNX model, or is cut short ({error}; {path.stat().st_size} bytes); "
            "expected a complete .onnx file"
        )
        raise ModelError(msg) from error
    if not proto.HasField("graph") or not proto.ir_version:
        msg = "holds no ONNX graph; expected a ModelProto with graph and ir_version"
        raise ModelError(msg)
    try:
        model: ir.Model = ir.from_proto(proto)
    except (ir.serde.SerdeError, ValueError, TypeError, KeyError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0][:300]
        msg = f"is not a valid model: {reason}"
        raise ModelError(msg) from error
    folder = path.parent.resolve()  # the tensors must outlive a change of the working directory
    ir.external_data.set_base_dir(model.graph, folder)
    for extent in extents:
        _map_initializer(model.graph.initializers[extent.name], extent, folder / path.name)
    return model


def _map_initializer(value: ir.Value, extent: onnx_wire.Extent, path: Path) -> None:
    tensor = value.const_value
    assert tensor is not None  # noqa: S101 - an initializer of the file just read
    if extent.length != tensor.nbytes:
        msg = (
            f"initializer '{extent.name}' {list(tensor.shape)} of type {tensor.dtype.name} holds "
            f"{extent.length} bytes, expected {tensor.nbytes}"
        )
        raise ModelError(msg)
    value.const_value = _mapped(path, extent.offset, extent.length, tensor, path.parent)


def _mapped(
    path: Path, offset: int, length: int, like: ir.TensorProtocol, folder: Path
) -> ir.ExternalTensor:
    # A file with several hard links is refused by ExternalTensor when it knows a base folder: who
    # may write there could have linked a foreign file. We checked containment ourselves, and a
    # hard link is how several package managers and caches store a file twice.
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


def _check_external(model: ir.Model, path: Path) -> None:
    folder = path.parent.resolve()
    checked: dict[str, int] = {}
    for value, tensor in _external_tensors(model):
        if not tensor.base_dir:
            continue
        location, offset, length = str(tensor.location), tensor.offset or 0, tensor.length
        if location not in checked:
            checked[location] = _check_data_file(location, folder, tensor.name or "")
        if length is not None and length != tensor.nbytes:
            msg = (
                f"external data of '{tensor.name}' is {length} bytes, its type and shape need "
                f"{tensor.nbytes}"
            )
            raise ModelError(msg)
        if offset + tensor.nbytes > checked[location]:
            msg = (
                f"external data '{location}' is cut short: '{tensor.name}' needs bytes {offset} to "
                f"{offset + tensor.nbytes}, the file has {checked[location]}; copy it again"
            )
            raise ModelError(msg)
        if value is not None:
            data = folder / location
            value.const_value = _mapped(data, offset, tensor.nbytes, tensor, folder)


def _check_data_file(location: str, folder: Path, name: str) -> int:
    """Size of an external data file that exists and lies inside ``folder``."""
    if not location or Path(location).is_absolute():
        msg = (
            f"initializer '{name}' names external data '{location}'; expected a path relative to "
            "the model's folder"
        )
        raise ModelError(msg)
    data = folder / location
    real = data.resolve()
    if not real.is_relative_to(folder):
        how = "is a link to" if data.is_symlink() else "points to"
        msg = (
            f"external data '{location}' {how} '{real}', outside of the model's folder; expected "
            "the data beside the model, so copy it there"
        )
        raise ModelError(msg)
    if not real.is_file():
        msg = (
            f"external data '{location}' of initializer '{name}' is missing in {folder}; copy it "
            "there together with the model"
        )
        raise ModelError(msg)
    with real.open("rb") as file:
        if file.read(len(_LFS_HEAD)) == _LFS_HEAD:
            msg = f"external data '{location}' is a Git LFS pointer; fetch it with 'git lfs pull'"
            raise ModelError(msg)
    return real.stat().st_size


def _external_tensors(model: ir.Model) -> Iterator[tuple[ir.Value | None, ir.ExternalTensor]]:
    """All external tensors: of initializers with their value, of node attributes without."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value, value.const_value
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and isinstance(
                attribute.value, ir.ExternalTensor
            ):
                yield None, attribute.value


def external_files(model: ir.Model) -> tuple[Path, ...]:
    """Every file the model's weights are mapped from, in order of first use."""
    return tuple({Path(tensor.path).resolve(): None for _, tensor in _external_tensors(model)})
