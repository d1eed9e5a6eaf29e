"""Where sample data lies: stacked arrays, folders, functions, iterables.

A source yields raw samples, as often as asked; whether they fit a model is ``samples``' business.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from optimizer.errors import CalibrationError

_FORMS = (
    "expected an .npz file with one array per model input stacked along the first axis, "
    "a folder with one .npz per feed, or module:function yielding dicts"
)


class Source(Protocol):
    """Raw samples that can be iterated any number of times."""

    where: str

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        """Yield one mapping of arrays per sample."""
        ...

    def label(self, index: int) -> str:
        """What messages call one sample."""
        ...


def open_source(spec: Any, ranks: Mapping[str, int], option: str) -> Source:
    """Recognise the form of ``spec`` (see ``samples.load_samples``).

    Args:
        spec: File, folder, ``module:function``, mapping, callable or iterable.
        ranks: Number of axes of each model input: tells arrays stacked along their own first
            axis ([N, ...] for an input [B, ...]) from stacks of whole feeds ([N, B, ...]).
        option: What messages call this data.

    Raises:
        CalibrationError: Nothing readable is there.
    """
    if isinstance(spec, (str, Path)):
        return _from_text(spec, ranks, option)
    if isinstance(spec, Mapping):
        return StackedSource({k: np.asarray(v) for k, v in spec.items()}, ranks, "data", option)
    if callable(spec):
        return FunctionSource(spec, getattr(spec, "__name__", "function"), option)
    if isinstance(spec, Iterable):
        samples = list(spec)
        return FunctionSource(lambda: samples, "data", option)
    raise CalibrationError(f"{option}: cannot read samples from {type(spec).__name__}; {_FORMS}.")


def _from_text(spec: str | Path, ranks: Mapping[str, int], option: str) -> Source:
    path = Path(spec)
    if path.is_dir():
        return FolderSource(path, option)
    if path.is_file():
        return StackedSource(open_npz(path, option), ranks, str(path), option)
    module, colon, function = str(spec).rpartition(":")
    if colon and module and function.isidentifier():
        return FunctionSource(_import_function(module, function, option), str(spec), option)
    raise CalibrationError(f"{option}: '{spec}' does not exist; {_FORMS}.")


class StackedSource:
    """Arrays stacked along the first axis."""

    def __init__(
        self, arrays: Mapping[str, np.ndarray], ranks: Mapping[str, int], where: str, option: str
    ) -> None:
        self.where = where
        counts = {n: len(a) for n, a in arrays.items() if a.ndim and n in ranks}
        if not counts:
            found = ", ".join(sorted(arrays)) or "no arrays"
            raise CalibrationError(
                f"{option}: {where} has none of the model's inputs; found {found}, "
                f"expected {', '.join(ranks)}."
            )
        self._count = next(iter(counts.values()))
        if len(set(counts.values())) > 1:
            sizes = ", ".join(f"{n}: {c}" for n, c in counts.items())
            raise CalibrationError(
                f"{option}: the arrays in {where} hold different numbers of samples ({sizes}); "
                "their first axes must agree."
            )
        # Arrays that are neither inputs nor one entry per sample say nothing about a sample.
        self._arrays = {
            n: a for n, a in arrays.items() if n in ranks or (a.ndim and len(a) == self._count)
        }
        self._whole = {n for n, a in self._arrays.items() if a.ndim == ranks.get(n, -2) + 1}

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        """Yield one row of every array."""
        for i in range(self._count):
            yield {
                n: a if a.ndim == 0 else a[i] if n in self._whole else a[i : i + 1]
                for n, a in self._arrays.items()
            }

    def label(self, index: int) -> str:
        """File and row."""
        return f"{self.where}, sample {index}"


class FolderSource:
    """One ``.npz`` file per feed, in the order of their names."""

    def __init__(self, path: Path, option: str) -> None:
        self.where = str(path)
        self._option = option
        self._paths = sorted(path.glob("*.npz"))
        if not self._paths:
            raise CalibrationError(f"{option}: folder {path} holds no .npz files; {_FORMS}.")

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        """Yield the arrays of one file after the other."""
        for path in self._paths:
            yield open_npz(path, self._option)

    def label(self, index: int) -> str:
        """The file."""
        return str(self._paths[index])


class FunctionSource:
    """A function that yields dicts, called once per pass over the data."""

    def __init__(self, function: Callable[[], Any], where: str, option: str) -> None:
        self.where = where
        self._function = function
        self._option = option

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        """Yield what the function yields."""
        try:
            samples = iter(self._function())
        except TypeError as error:
            raise CalibrationError(
                f"{self._option}: {self.where} must be callable without arguments and return an "
                f"iterable of dicts of arrays ({error})."
            ) from error
        for index, sample in enumerate(samples):
            if not isinstance(sample, Mapping):
                raise CalibrationError(
                    f"{self._option}: {self.label(index)} is {type(sample).__name__}; expected a "
                    "dict of arrays by input name."
                )
            yield sample

    def label(self, index: int) -> str:
        """Function and position."""
        return f"{self.where}, sample {index}"


def _import_function(module: str, function: str, option: str) -> Callable[[], Any]:
    try:
        if module.endswith(".py"):
            found = importlib.util.spec_from_file_location(Path(module).stem, module)
            if found is None or found.loader is None or not Path(module).is_file():
                raise CalibrationError(f"{option}: {module} is not a Python file.")
            loaded = importlib.util.module_from_spec(found)
            found.loader.exec_module(loaded)
        else:
            # As ``python -m`` does: a module beside the user's model is importable.
            here = str(Path.cwd())
            if here not in sys.path:
                sys.path.insert(0, here)
            loaded = importlib.import_module(module)
    except ImportError as error:
        raise CalibrationError(
            f"{option}: '{module}:{function}' is neither a file nor an importable function "
            f"({error}); {_FORMS}."
        ) from error
    result = getattr(loaded, function, None)
    if not callable(result):
        raise CalibrationError(f"{option}: module '{module}' has no function '{function}'.")
    return result  # type: ignore[no-any-return]


def open_npz(path: Path, option: str) -> dict[str, np.ndarray]:
    """Arrays of an ``.npz`` file; those stored uncompressed are memory-mapped.

    Raises:
        CalibrationError: The file is damaged or holds objects instead of arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = [i for i in archive.infolist() if i.filename.endswith(".npy")]
            return {info.filename[:-4]: _member(archive, info, path, file) for info in members}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise CalibrationError(
            f"{option}: {path} cannot be read as .npz ({error}); expected a file written by "
            "numpy.savez with plain numeric arrays."
        ) from error


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, file: Any) -> np.ndarray:
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        reader = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = reader(stream)
        header = stream.tell()
    empty = 0 in shape or shape == ()
    if info.compress_type != zipfile.ZIP_STORED or dtype.hasobject or empty:
        with archive.open(info) as stream:
            array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
            return array
    # Local file header: 30 bytes, then name and extra field, whose lengths are at 26 and 28
    # (the central directory's lengths may differ).
    file.seek(info.header_offset + 26)
    name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    start = info.header_offset + 30 + name + extra + header
    order: Any = "F" if fortran else "C"
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape, order=order)


def stacked(samples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Samples with batch axis one -> arrays stacked along the first axis."""
    return {n: np.concatenate([s[n] for s in samples]) for n in samples[0]}
