"""Where the compiled operators lie."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from optimizer.custom_ops.declaration import declaration_hash
from optimizer.errors import MissingDependencyError

_SUFFIX = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
_NAME = f"liboptimize_ops.{_SUFFIX}"
_FOLDER = Path(__file__).resolve().parent.parent / "native"
#: Names a library to use instead of the installed one.
VARIABLE = "OPTIMIZE_OPS_LIBRARY"


def library_path() -> Path:
    """The library to register: ``SessionOptions.register_custom_ops_library(str(...))``.

    Raises:
        MissingDependencyError: It was not built with this installation, or from another declaration
            of the operators.
    """
    places = list(_places())
    return _checked(next((path for path in places if path.is_file()), places[0]))


def _places() -> Iterator[Path]:
    if named := os.environ.get(VARIABLE):
        yield Path(named)
        return
    yield from installed_places(_NAME)


def installed_places(name: str) -> Iterator[Path]:
    """Where an installation has a compiled library, the usual place first."""
    yield _FOLDER / name
    try:  # an editable installation keeps what was compiled apart from the sources
        files = metadata.distribution("optimize-onnx").files or ()
    except metadata.PackageNotFoundError:
        return
    yield from (Path(str(file.locate())) for file in files if file.name == name)


@functools.cache
def _checked(path: Path) -> Path:
    if not path.is_file():
        raise MissingDependencyError(
            f"the library of custom operators is not at {path}: this installation was made without "
            "a C++ compiler. Install a C++17 compiler and cmake, then reinstall: `pip install "
            "--force-reinstall --no-deps optimize-onnx`. Models run without it too, at the speed "
            "of dense weights: each carries the operator's body in standard operators."
        )
    try:
        built = int(_int64(ctypes.CDLL(str(path)).optimize_sparse_matmul_declaration)())
    except (OSError, AttributeError) as error:
        raise MissingDependencyError(
            f"the library of custom operators at {path} cannot be loaded ({error}); rebuild it: "
            "reinstall optimize-onnx."
        ) from error
    if built != declaration_hash():
        raise MissingDependencyError(
            f"the library of custom operators at {path} was built from another declaration "
            f"({built}) than this version's ({declaration_hash()}); rebuild it: reinstall "
            "optimize-onnx."
        )
    return path


def _int64(function: ctypes._NamedFuncPointer) -> ctypes._NamedFuncPointer:
    function.restype = ctypes.c_int64
    return function
