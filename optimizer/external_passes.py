"""Passes from elsewhere: classes and functions in a file, and entry points of distributions.

Whatever is wrong with one is an ``OptionError`` that says where and what to do: a file of the
user's is an input like any other.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from optimizer import graphsurgeon
from optimizer.errors import (
    MissingDependencyError,
    OptimizerError,
    OptionError,
    place_of,
)
from optimizer.pass_base import Exactness, GraphPass, PassOptions

ENTRY_POINT_GROUP = "optimizer.passes"
#: Keys of a recipe's step that say where a pass came from; no option can be called so.
FILE_DIGEST, DISTRIBUTION = "file-sha256", "distribution-version"

#: What every pass says about itself, at the begin of a line.
HEADINGS = ("Rewrite:", "Applies when:", "Exactness:", "Cost:", "Source:")

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_INVARIANTS = frozenset({"inputs", "outputs"})
#: Calls that make a script for onnx-graphsurgeon do its work as soon as it is read.
_WHOLE_SCRIPT = ("gs.import_onnx", "gs.export_onnx", "onnx.load", "onnx.save")


def is_file_spec(spec: str) -> bool:
    """Whether a pass is named by its file: ``./file.py:NAME``, or without a name by mistake."""
    return ".py:" in spec or spec.endswith(".py")


def load_file(spec: str, reserved: Collection[str] = ()) -> type[GraphPass[Any]]:
    """The pass in a file: a class, or a function for onnx-graphsurgeon.

    Args:
        spec: ``./file.py:NAME``.
        reserved: Names that a pass must not have.

    Raises:
        OptionError: The file or what it names cannot be used; says where and why.
    """
    path_text, _, name = spec.rpartition(":") if ".py:" in spec else (spec, "", "")
    path = Path(path_text)
    where = f"pass '{spec}'"
    try:
        source = path.read_bytes()
    except OSError as error:
        msg = f"{where}: file '{path}' cannot be read: {error.strerror}; expected PATH.py:NAME"
        raise OptionError(msg) from error
    tree = _parsed(source, path, where)
    defined = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    if not name:
        known = f"it defines {', '.join(defined)}" if defined else "it defines no class or function"
        msg = f"{where}: which part of the file? write {path}:NAME; {known}"
        raise OptionError(msg)
    _refuse_whole_script(tree, path, where)
    module = _module(tree, source, path, where)
    if not hasattr(module, name):
        close = difflib.get_close_matches(name, defined, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"it defines {', '.join(defined)}"
        msg = f"{where}: file '{path}' defines no '{name}'; {hint}"
        raise OptionError(msg)
    found = getattr(module, name)
    if isinstance(found, FunctionType):
        found = graphsurgeon.pass_of_function(found, where)
    return checked(found, where, reserved)


def _parsed(source: bytes, path: Path, where: str) -> ast.Module:
    try:
        return ast.parse(source, str(path))
    except (SyntaxError, ValueError) as error:  # a null byte is a ValueError
        line = getattr(error, "lineno", None) or 1
        msg = f"{where}: {path}:{line}: {type(error).__name__}: {_first_line(error)}"
        raise OptionError(f"{msg}; correct the file") from error


def _refuse_whole_script(tree: ast.Module, path: Path, where: str) -> None:
    """A script that loads and saves by itself would do so now, on files of its own choice."""
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef) or _is_main(statement):
            continue
        for node in ast.walk(statement):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func).replace("onnx_graphsurgeon.", "gs.")
            if called in _WHOLE_SCRIPT or called in ("import_onnx", "export_onnx"):
                msg = (
                    f"{where}: {path}:{node.lineno} calls {called} as soon as the file is read; "
                    "put what lies between gs.import_onnx and gs.export_onnx into a function "
                    f"`def fix(graph): ...` and name it: {path}:fix"
                )
                raise OptionError(msg)


def _is_main(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)


def _module(tree: ast.Module, source: bytes, path: Path, where: str) -> ModuleType:
    """Run a file as a module of its own; the same content is run once.

    The module is registered: dataclasses and pydantic look up what annotations mean there.
    """
    digest = hashlib.sha256(bytes(path.resolve()) + b"\0" + source).hexdigest()[:16]
    name = f"optimizer_pass_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path.resolve())
    sys.modules[name] = module
    try:
        # Not through an import: that would leave a cache folder beside the user's file.
        exec(compile(tree, str(path), "exec"), module.__dict__)  # noqa: S102
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if getattr(error, "name", None) == "onnx_graphsurgeon":
            raise MissingDependencyError(f"{where}: {graphsurgeon.MISSING}") from error
        raise OptionError(_import_failed(error, path, where)) from error
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_failed(error: BaseException, path: Path, where: str) -> str:
    """Which line of the file failed, and how."""
    text = f"{where}: {place_of(error, path)}: {type(error).__name__}: {_first_line(error)}"
    missing = getattr(error, "name", None)
    if isinstance(error, ModuleNotFoundError) and missing:
        if (path.parent / f"{missing.partition('.')[0]}.py").exists():
            return (
                f"{text}; it lies beside the file, so put that folder on the path: "
                f"PYTHONPATH={path.parent}"
            )
        return f"{text}; install it, or correct the file"
    return f"{text}; correct the file"


def _first_line(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return (text.strip().splitlines() or ["without a message"])[0][:200]


def entry_points() -> dict[str, tuple[importlib.metadata.EntryPoint, ...]]:
    """What installed distributions register, by name."""
    found: dict[str, tuple[importlib.metadata.EntryPoint, ...]] = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def load_entry_point(
    points: tuple[importlib.metadata.EntryPoint, ...], reserved: Collection[str] = ()
) -> type[GraphPass[Any]]:
    """The pass that a distribution registers.

    Args:
        points: All of one name.
        reserved: Names that a pass must not have.

    Raises:
        OptionError: It cannot be loaded or used, or two distributions register the name.
    """
    point = points[0]
    where = f"entry point '{point.name}' of {_owner(point)}"
    if len(points) > 1:
        msg = f"pass '{point.name}' is registered by {' and '.join(map(_owner, points))}"
        raise OptionError(f"{msg}; uninstall one of them")
    try:
        found = point.load()
    except (Exception, SystemExit) as error:
        msg = f"{where} cannot be loaded: {type(error).__name__}: {_first_line(error)}"
        raise OptionError(f"{msg}; update or uninstall the distribution") from error
    if getattr(found, "name", point.name) != point.name:
        msg = f"{where} loads a pass called '{found.name}'; both names must be the same"
        raise OptionError(msg)
    return checked(found, where, reserved)


def _owner(point: importlib.metadata.EntryPoint) -> str:
    return "an unknown distribution" if point.dist is None else f"distribution '{point.dist.name}'"


def origin(spec: str) -> dict[str, str]:
    """What identifies the code of a pass from elsewhere, to be kept in a recipe."""
    if is_file_spec(spec):
        try:
            content = Path(spec.rpartition(":")[0]).read_bytes()
        except OSError:
            return {}
        return {FILE_DIGEST: hashlib.sha256(content).hexdigest()}
    for point in entry_points().get(spec, ()):
        if point.dist is not None:
            return {DISTRIBUTION: f"{point.dist.name} {point.dist.version}"}
    return {}


def checked(found: Any, where: str, reserved: Collection[str] = ()) -> type[GraphPass[Any]]:
    """``found``, if it is a pass that can be used.

    Raises:
        OptionError: It is none, or does not declare what it must.
    """
    for problem in problems(found, reserved):
        raise OptionError(f"{where}: {problem}")
    usable: type[GraphPass[Any]] = found
    return usable


def problems(found: Any, reserved: Collection[str] = ()) -> Iterator[str]:
    """What keeps an object from being used as a pass, each with what to do."""
    if isinstance(found, GraphPass):
        yield "it is an object of a pass; name the class itself"
        return
    if not (inspect.isclass(found) and issubclass(found, GraphPass)):
        yield f"it is {found!r}, expected a subclass of optimizer.pass_base.GraphPass"
        return
    class_name, name = found.__name__, getattr(found, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        yield f"{class_name}.name is {name!r}, expected lower-case words joined by '-'"
    elif name in reserved:
        yield f"{class_name}.name is '{name}', a name of this program's own; choose another"
    if not isinstance(getattr(found, "exactness", None), Exactness):
        yield f"{class_name} declares no exactness; expected one of optimizer.pass_base.Exactness"
    if found.call is GraphPass.call:
        yield f"{class_name} does not define call(self, model, context)"
    yield from _problems_of_declarations(found)
    option_problems = list(_problems_of_options(found))
    yield from option_problems
    if not option_problems:
        try:
            found().needs_calibration()
        except OptimizerError as error:
            yield f"{class_name} cannot be created with its default options: {error}"
        except Exception as error:  # foreign code may raise anything
            yield (
                f"{class_name} cannot be created with its default options: "
                f"{type(error).__name__}: {_first_line(error)}"
            )


def _problems_of_declarations(found: type[GraphPass[Any]]) -> Iterator[str]:
    after, emits, breaks = found.after, found.emits, found.breaks
    if not isinstance(after, tuple | list) or not all(isinstance(item, str) for item in after):
        yield f"{found.__name__}.after is {after!r}, expected a tuple of names of passes"
    pairs = isinstance(emits, tuple | list) and all(
        isinstance(item, tuple) and len(item) == 2 and all(isinstance(part, str) for part in item)
        for item in emits
    )
    if not pairs:
        yield f"{found.__name__}.emits is {emits!r}, expected pairs of domain and operator"
    if not isinstance(breaks, frozenset | set) or not breaks <= _INVARIANTS:
        yield f"{found.__name__}.breaks is {breaks!r}, expected a set of 'inputs' and 'outputs'"


def _problems_of_options(found: type[GraphPass[Any]]) -> Iterator[str]:
    options = found.Options
    if not (inspect.isclass(options) and issubclass(options, PassOptions)):
        yield (
            f"{found.__name__}.Options is {options!r}, expected a subclass of "
            "optimizer.pass_base.PassOptions"
        )
        return
    if not options.model_config.get("frozen") or options.model_config.get("extra") != "forbid":
        yield f"{options.__name__} must stay frozen and forbid unknown options"
    for name, info in options.model_fields.items():
        if info.is_required():
            yield f"option '{name}' has no default; every pass can be run without options"


def documentation(pass_class: type[GraphPass[Any]]) -> str:
    """What a pass says about itself: of its class and its module, the text with the headings."""
    own = inspect.cleandoc(pass_class.__doc__ or "")
    module = sys.modules.get(pass_class.__module__)
    of_module = inspect.cleandoc(getattr(module, "__doc__", None) or "")
    texts = [text for text in (own, of_module) if any(heading in text for heading in HEADINGS)]
    return next(iter(texts), own or of_module)
