"""Finds our plugin library for TensorRT, so that nobody has to name it."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from optimizer.custom_ops.declaration import DOMAIN
from optimizer.errors import OptionError

VARIABLE = "OPTIMIZE_TENSORRT_LIBRARY"
_FILE = "liboptimize_tensorrt.so"


def find_plugins(named: Sequence[Path], domains: Collection[str]) -> tuple[Path, ...]:
    """The libraries to load: those named, and ours where the model has one of our operators.

    Raises:
        OptionError: A file does not exist.
    """
    found = list(named)
    given = os.environ.get(VARIABLE)
    beside = Path(__file__).resolve().parent.parent / "custom_ops" / _FILE
    if DOMAIN in domains and not any(item.name == _FILE for item in found):
        if given:
            found.append(Path(given))
        elif beside.is_file():
            found.append(beside)
    for item in found:
        if not item.is_file():
            msg = (
                f"--plugin: there is no file {item}; build the library as plugins/README.md says, "
                f"and name it here or in {VARIABLE}"
            )
            raise OptionError(msg)
    return tuple(found)
