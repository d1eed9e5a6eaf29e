"""The passes, in the order they belong in a recipe.

Adding one: a module ``passes/<name with _ for ->.py`` with a ``GraphPass`` of that name, and one
line in ``PASS_NAMES``. Modules are imported when a pass is asked for, so listing names costs
nothing.

Passes from elsewhere come in two ways: an installed distribution registers a class under the
entry-point group ``optimizer.passes``, and ``./file.py:Class`` names a class in a file.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.errors import OptionError

if TYPE_CHECKING:
    from types import ModuleType

    from optimizer.pass_base import GraphPass

PASS_NAMES: tuple[str, ...] = ("canonicalize", "cqil", "outliertune", "fuse-concurrent")
ENTRY_POINT_GROUP = "optimizer.passes"


def get_pass(name: str) -> type[GraphPass[Any]]:
    """The class of a pass, by name, entry point or ``./file.py:Class``.

    Raises:
        OptionError: There is no such pass, or what was found is not a ``GraphPass``.
    """
    if name in PASS_NAMES:
        module = importlib.import_module(f"passes.{name.replace('-', '_')}")
        return _class_named(module, name)
    if ".py:" in name:
        return _from_file(name)
    registered = _entry_points()
    if name in registered:
        return _checked(registered[name].load(), f"entry point '{name}'")
    known = (*PASS_NAMES, *sorted(registered))
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"known passes: {', '.join(known)}"
    msg = f"there is no pass '{name}'; {hint}"
    raise OptionError(msg)


def all_names() -> tuple[str, ...]:
    """Names of the built-in passes in order, then those of installed entry points."""
    return (*PASS_NAMES, *sorted(set(_entry_points()) - set(PASS_NAMES)))


def __getattr__(attribute: str) -> tuple[type[GraphPass[Any]], ...]:
    if attribute == "PASSES":
        return tuple(get_pass(name) for name in PASS_NAMES)
    msg = f"module 'passes' has no attribute '{attribute}'"
    raise AttributeError(msg)


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}


def _class_named(module: ModuleType, name: str) -> type[GraphPass[Any]]:
    for member in vars(module).values():
        if inspect.isclass(member) and vars(member).get("name") == name:
            return _checked(member, f"module '{module.__name__}'")
    msg = f"module '{module.__name__}' defines no pass with the name '{name}'"
    raise OptionError(msg)


def _from_file(spec: str) -> type[GraphPass[Any]]:
    path_text, _, class_name = spec.rpartition(":")
    path = Path(path_text)
    if not path.is_file():
        msg = f"pass '{spec}': file '{path}' does not exist; expected PATH.py:CLASS"
        raise OptionError(msg)
    module_spec = importlib.util.spec_from_file_location(f"optimizer_pass_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        msg = f"pass '{spec}': file '{path}' cannot be imported"
        raise OptionError(msg)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, class_name):
        msg = f"pass '{spec}': file '{path}' defines no '{class_name}'"
        raise OptionError(msg)
    return _checked(getattr(module, class_name), f"'{spec}'")


def _checked(found: Any, where: str) -> type[GraphPass[Any]]:
    from optimizer.pass_base import GraphPass  # importing it here keeps listing names cheap

    if inspect.isclass(found) and issubclass(found, GraphPass):
        return found
    msg = f"{where} holds {found!r}, expected a subclass of optimizer.pass_base.GraphPass"
    raise OptionError(msg)
