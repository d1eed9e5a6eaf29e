"""Which data file a weight is written to: the one that belongs to the file it came from.

A model whose weights lie in several files (a limit of the place it is kept in, usually) is written
with as many. A weight stays with those of its file, also transposed, cut or converted; one made of
several goes with the first of them. What came from no such file gets one of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

_SOURCE = "optimize.source_file"
#: Old exporters write a file per weight: more files than this are no shards, and become one.
MOST_FILES = 100


def note_source(tensor: ir.TensorProtocol, source: ir.TensorProtocol | None) -> None:
    """Remember that ``tensor`` was made of ``source``, if that came from a file."""
    path = None if source is None else source_file(source)
    if path is not None:
        tensor.meta[_SOURCE] = path


def source_file(tensor: ir.TensorProtocol) -> Path | None:
    """The file that the numbers of a tensor came from, None for made ones."""
    if isinstance(tensor, ir.ExternalTensor):
        return Path(tensor.path)
    found: Path | None = tensor.meta.get(_SOURCE)
    return found


def count_files(sources: Sequence[Path]) -> int:
    """How many data files there are for weights that lay in these, at most."""
    return 1 if not 2 <= len(sources) <= MOST_FILES else len(sources) + 1


def distribute(tensors: Sequence[ir.TensorProtocol], sources: Sequence[Path]) -> list[list[int]]:
    """The tensors of each data file, as indices in order.

    Args:
        tensors: All that are written outside.
        sources: Data files of the input, resolved.
    """
    if count_files(sources) == 1:
        return [list(range(len(tensors)))]
    place = {path: number for number, path in enumerate(sources)}
    resolved: dict[Path | None, Path | None] = {None: None}
    groups: list[list[int]] = [[] for _ in range(len(sources) + 1)]
    for index, tensor in enumerate(tensors):
        path = source_file(tensor)
        if path not in resolved:
            resolved[path] = path.resolve() if path is not None else None
        real = resolved[path]
        groups[len(sources) if real is None else place.get(real, len(sources))].append(index)
    return [group for group in groups if group] or [[]]
