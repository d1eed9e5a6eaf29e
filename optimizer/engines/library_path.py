"""Finds our plugin library for TensorRT, so that nobody has to name it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from optimizer.custom_ops.declaration import DOMAIN
from optimizer.custom_ops.library import installed_places
from optimizer.errors import EngineError, OptionError
from optimizer.hashing import hash_file

VARIABLE = "OPTIMIZE_TENSORRT_LIBRARY"
_FILE = "liboptimize_tensorrt.so"
_README = "build the library as plugins/README.md says"


def installed_library() -> Path | None:
    """Our library: the one that the environment names, else the one of this installation."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given)
    return next((path for path in installed_places(_FILE) if path.is_file()), None)


def find_plugins(named: Sequence[Path], domains: Collection[str]) -> tuple[Path, ...]:
    """The libraries to load: those named, and ours where the model has one of our operators.

    Raises:
        OptionError: A file does not exist.
    """
    found = list(named)
    own = installed_library()
    if DOMAIN in domains and own is not None and not any(item.name == _FILE for item in found):
        found.append(own)
    for item in found:
        if not item.is_file():
            msg = f"--plugin: there is no file {item}; {_README}, and name it here or in {VARIABLE}"
            raise OptionError(msg)
    return tuple(found)


def find_engine_plugins(
    engine: Path, named: Sequence[Path], wanted: Sequence[Mapping[str, Any]]
) -> tuple[Path, ...]:
    """The libraries that an engine was built with.

    One that is named is taken; one that is found, in this installation or beside the engine, must
    be the very file.

    Args:
        engine: The file.
        named: Libraries to load in any case.
        wanted: "file" and "sha256" of each, from the manifest.

    Raises:
        EngineError: One is nowhere, or is another one.
        OptionError: A file that was named does not exist.
    """
    found = list(find_plugins(named, ()))
    have = {item.name for item in found}
    own = installed_library()
    for row in wanted:
        name = str(row["file"])
        if name in have:
            continue
        places = [engine.parent / name, *([own] if own is not None and own.name == name else [])]
        there = [item for item in places if item.is_file()]
        if not there:
            msg = f"{engine}: needs the plugin library {name}, which is neither beside it nor in "
            raise EngineError(f"{msg}this installation; name it with --plugin, or {_README}")
        same = [item for item in there if hash_file(item) == row["sha256"]]
        if not same:
            msg = (
                f"{engine}: was built with another plugin library than {there[0]}; build the "
                f"engine again, or name a library that fits it with --plugin"
            )
            raise EngineError(msg)
        found.append(same[0])
    return tuple(found)
