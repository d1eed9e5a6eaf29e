"""Writes models: one tensor in memory at a time, all or nothing, always the same bytes."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

import onnx
import onnx_ir as ir

from optimizer import onnx_wire
from optimizer.data_files import distribute
from optimizer.errors import ExportError, OptionError
from optimizer.hashing import GrowingHash
from optimizer.model_tensors import held_tensors, in_memory
from optimizer.onnx_wire import Progress

ExternalData: TypeAlias = Literal["auto", "always", "never"]

#: From this size on a model is written with external data: protobuf ends at 2 GiB, and readers
#: that copy the message need room below that.
EXTERNAL_FROM = 1_500_000_000
_PROTOBUF_LIMIT = 2**31 - 1
# Offsets of external tensors: whole pages for what is worth mapping on its own, a cache line else.
_PAGE, _LINE, _PAGED_FROM = 4096, 64, 1 << 20
_Streamed: TypeAlias = tuple[ir.Value, ir.TensorProtocol]


def size_text(count: float) -> str:
    """A number of bytes for people, in decimal units: ``438 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if count >= 9.95 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def data_paths(path: Path, count: int = 1) -> tuple[Path, ...]:
    """Where the external data of a model written to ``path`` goes."""
    if count == 1:
        return (path.with_name(f"{path.name}.data"),)
    return tuple(path.with_name(f"{path.name}.{n}.data") for n in range(1, count + 1))


def manifest_path(output: Path) -> Path:
    """Where the manifest of a model or an engine written to ``output`` goes."""
    return output.with_name(output.name + ".manifest.json")


@dataclass(frozen=True)
class Companion:
    """A further file, which tells about those of the model and appears together with them.

    Attributes:
        path: Of the file.
        content: Makes its bytes from (file name, SHA-256) of the files of the model.
    """

    path: Path
    content: Callable[[Sequence[tuple[str, str]]], bytes]


def check_output(
    path: Path,
    *,
    force: bool,
    protected: Sequence[Path] = (),
    beside: Sequence[Path] = (),
    data_files: int = 1,
) -> None:
    """Refuse an output that would destroy something, before any work is done.

    Args:
        path: Of the model to be written.
        force: Existing files may be replaced, protected ones never.
        protected: The input model and its external data.
        beside: Other files that will be written.
        data_files: Number of files that external data may need.

    Raises:
        OptionError: The folder is missing, the path is an input, or exists without ``force``.
    """
    if path.is_dir():
        msg = (
            f"output {path} is a folder; expected the name of a file, such as {path / 'model.onnx'}"
        )
        raise OptionError(msg)
    if not path.parent.is_dir():
        msg = f"output {path}: folder '{path.parent}' does not exist; create it first"
        raise OptionError(msg)
    inputs = {item.resolve() for item in protected}
    for item in (path, *data_paths(path, data_files), *beside):
        if item.resolve() in inputs:
            msg = (
                f"output {item} is the input itself, which is never overwritten; choose another -o"
            )
            raise OptionError(msg)
    for item in () if force else (path, *beside):
        if item.exists() or item.is_symlink():  # a link that leads nowhere is somebody's too
            msg = f"output {item} exists; choose another -o, or replace it with --force"
            raise OptionError(msg)


def save_model(
    model: ir.Model,
    path: str | Path,
    external_data: ExternalData = "auto",
    *,
    force: bool = False,
    protected: Sequence[Path] = (),
    sources: Sequence[Path] = (),
    companion: Companion | None = None,
    progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Write a model under temporary names, then rename all files.

    Args:
        model: Unchanged.
        path: Of the ``.onnx`` file; external data goes to ``data_paths``.
        external_data: ``auto`` writes it from 1.5 GB on.
        force: Replace existing files.
        protected: Files that are never replaced.
        sources: Data files of the input, resolved; several of them are kept apart, see
            ``data_files``.
        companion: A file to write with them.
        progress: Called with (bytes written, bytes in all).

    Returns:
        The files written: the model, its data, the companion.

    Raises:
        OptionError: See ``check_output``; or ``never`` with a model too large for one file.
        ExportError: The system refused to write. Nothing is left behind.
    """
    path = Path(path)
    streamed = _streamed(model)
    total = sum(tensor.nbytes for _, tensor in streamed)
    if external_data == "never" and total > _PROTOBUF_LIMIT:
        msg = (
            f"a model of {size_text(total)} does not fit one file (limit 2.1 GB); drop "
            "--external-data never"
        )
        raise OptionError(msg)
    outside = external_data == "always" or (external_data == "auto" and total >= EXTERNAL_FROM)
    groups = distribute([tensor for _, tensor in streamed], sources) if outside else []
    own = (path, *(data_paths(path, len(groups)) if groups else ()))
    targets = own if companion is None else (*own, companion.path)
    check_output(path, force=force, protected=protected, beside=targets[1:])
    with complete_or_nothing(targets, total) as files, contextlib.ExitStack() as stack:
        hashed = files[: len(own)] if companion is not None else ()
        hashes = {file: stack.enter_context(GrowingHash(file)) for file in hashed}
        if outside:
            parts = [
                _DataFile(file, target.name, [streamed[index] for index in group])
                for file, target, group in zip(files[1:], own[1:], groups, strict=False)
            ]
            _write_external(model, files[0], parts, progress, hashes)
        else:
            _write_inline(model, streamed, files[0], _followed(progress, hashes.get(files[0])))
        if companion is not None:
            names = [target.name for target in own]
            digests = [digest.digest() for digest in hashes.values()]
            files[-1].write(companion.content(list(zip(names, digests, strict=True))))
    return targets


@dataclass(frozen=True)
class _DataFile:
    """One file of external data, and what goes into it."""

    file: BinaryIO
    name: str
    streamed: Sequence[_Streamed]


def _followed(progress: Progress | None, digest: GrowingHash | None) -> Progress | None:
    """``progress`` that tells the hash of the file as well."""
    if digest is None:
        return progress
    follower = digest

    def report(done: int, total: int) -> None:
        follower.grown()
        if progress is not None:
            progress(done, total)

    return report


def _streamed(model: ir.Model) -> list[_Streamed]:
    """Initializers of the main graph that are written without protobuf, in order."""
    return [
        (value, value.const_value)
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and value.const_value.dtype != ir.DataType.STRING
        and value.const_value.nbytes > onnx_wire.INLINE_LIMIT
    ]


def _placed(streamed: Sequence[_Streamed], location: str) -> list[ir.ExternalTensor]:
    """The same tensors as references into a data file."""
    places = []
    end = 0
    for value, tensor in streamed:
        step = _PAGE if tensor.nbytes >= _PAGED_FROM else _LINE
        start = -(-end // step) * step
        end = start + tensor.nbytes
        places.append(
            ir.ExternalTensor(
                location,
                start,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
            )
        )
    return places


def _serialized(
    model: ir.Model,
    streamed: Sequence[_Streamed],
    places: Sequence[ir.ExternalTensor],
) -> onnx.ModelProto:
    """The model as protobuf, with references in place of the streamed tensors."""
    try:
        for (value, _), place in zip(streamed, places, strict=True):
            value.const_value = place
        with _small_in_memory(model, {value for value, _ in streamed}):
            return ir.to_proto(model)
    finally:
        for value, tensor in streamed:
            value.const_value = tensor


@contextlib.contextmanager
def _small_in_memory(model: ir.Model, streamed: Container[ir.Value]) -> Iterator[None]:
    """Hold what is not streamed, but was external in the input, as numbers.

    Nothing written may refer to the input's files.
    """
    external = [
        held
        for held in held_tensors(model)
        if isinstance(held.tensor, ir.ExternalTensor) and held.initializer not in streamed
    ]
    try:
        for held in external:
            held.replace(in_memory(held.tensor))
        yield
    finally:
        for held in external:
            held.replace(held.tensor)


def _write_external(
    model: ir.Model,
    file: BinaryIO,
    parts: Sequence[_DataFile],
    progress: Progress | None,
    hashes: Mapping[BinaryIO, GrowingHash],
) -> None:
    placed = [_placed(part.streamed, part.name) for part in parts]
    streamed = [item for part in parts for item in part.streamed]
    places = [place for each in placed for place in each]
    file.write(_serialized(model, streamed, places).SerializeToString(deterministic=True))
    total = sum(place.nbytes for place in places)
    written = 0
    for part, own in zip(parts, placed, strict=True):
        report = _followed(progress, hashes.get(part.file))
        for (_, tensor), place in zip(part.streamed, own, strict=True):
            gap = (place.offset or 0) - part.file.tell()
            part.file.write(b"\0" * gap)
            onnx_wire.write_tensor(tensor, part.file)
            written += tensor.nbytes
            if report is not None:
                report(written, total)


def _write_inline(
    model: ir.Model,
    streamed: Sequence[_Streamed],
    file: BinaryIO,
    progress: Progress | None,
) -> None:
    proto = _serialized(model, streamed, _placed(streamed, "inline"))
    by_name = {value.name: tensor for value, tensor in streamed}
    tensors = [by_name.get(item.name) for item in proto.graph.initializer]
    onnx_wire.write_inline(proto, tensors, file, progress)


@contextlib.contextmanager
def complete_or_nothing(targets: Sequence[Path], size: int) -> Iterator[list[BinaryIO]]:
    """Open a temporary file per target; rename all on success, remove all on any other way out.

    Raises:
        ExportError: The system refused to write.
    """
    temporary = [item.with_name(f".{item.name}.{os.getpid()}.tmp") for item in targets]
    with contextlib.ExitStack() as cleanup:
        try:
            with contextlib.ExitStack() as open_files:
                files: list[BinaryIO] = []
                for item in temporary:
                    # Exclusive: a link that somebody put there is not followed, nor removed.
                    files.append(open_files.enter_context(item.open("xb")))
                    cleanup.callback(item.unlink, missing_ok=True)
                yield files
            # The data first: a model file whose data is not there yet would be a partial output.
            for item, target in reversed(list(zip(temporary, targets, strict=True))):
                item.replace(target)
        except OSError as error:
            raise _export_error(targets[0], size, error) from error


def _export_error(path: Path, size: int, error: OSError) -> ExportError:
    reason = error.strerror or str(error)
    free = shutil.disk_usage(path.parent).free
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or free < size:
        advice = (
            f"about {size_text(size)} needed, {size_text(free)} free; make room or choose another "
            "folder with -o"
        )
    else:
        advice = "choose another folder with -o"
    return ExportError(f"{path}: could not be written: {reason}; {advice}; nothing was kept")
