"""The passes, in the order they belong in a recipe.

Adding one: a module ``passes/<name with _ for ->.py`` with a ``GraphPass`` of that name, and one
line in ``PASS_NAMES``. Modules are imported when a pass is asked for, so listing names costs
nothing.

Passes from elsewhere (``optimizer.external_passes``): an installed distribution registers a class
under the entry-point group ``optimizer.passes``, and ``./file.py:NAME`` names a class in a file, or
a function for onnx-graphsurgeon.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from typing import TYPE_CHECKING, Any, cast

from optimizer.errors import OptionError

if TYPE_CHECKING:
    from types import ModuleType

    from optimizer.pass_base import GraphPass

PASS_NAMES: tuple[str, ...] = (
    "canonicalize",
    "cqil",
    "tome",
    "crossget",
    "prune-tokens",
    "sparsify",
    "outliertune",
    "fuse-concurrent",
    "sparse-matmul",
    "fp16",
    "bf16",
)
#: Names that passes from elsewhere cannot have: reports have a stage of the last one.
RESERVED = (*PASS_NAMES, "legalize")


def get_pass(name: str) -> type[GraphPass[Any]]:
    """The class of a pass, by name, entry point or ``./file.py:NAME``.

    Raises:
        OptionError: There is no such pass, or what was found cannot be used as one.
    """
    if name in PASS_NAMES:
        module = importlib.import_module(f"passes.{name.replace('-', '_')}")
        return _class_named(module, name)
    from optimizer import external_passes  # importing it here keeps listing names cheap

    if external_passes.is_file_spec(name):
        return external_passes.load_file(name, RESERVED)
    registered = external_passes.entry_points()
    if name in registered:
        return external_passes.load_entry_point(registered[name], RESERVED)
    known = (*PASS_NAMES, *sorted(registered))
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"known passes: {', '.join(known)}"
    msg = f"there is no pass '{name}'; {hint}"
    raise OptionError(msg)


def all_names() -> tuple[str, ...]:
    """Names of the built-in passes in order, then those of installed entry points."""
    from optimizer import external_passes

    return (*PASS_NAMES, *sorted(set(external_passes.entry_points()) - set(PASS_NAMES)))


def __getattr__(attribute: str) -> tuple[type[GraphPass[Any]], ...]:
    if attribute == "PASSES":
        return tuple(get_pass(name) for name in PASS_NAMES)
    msg = f"module 'passes' has no attribute '{attribute}'"
    raise AttributeError(msg)


def _class_named(module: ModuleType, name: str) -> type[GraphPass[Any]]:
    for member in vars(module).values():
        if inspect.isclass(member) and vars(member).get("name") == name:
            return cast("type[GraphPass[Any]]", member)
    msg = f"module '{module.__name__}' defines no pass with the name '{name}'"
    raise OptionError(msg)
