"""Any ``torch.nn.Module`` to ONNX: from a factory named on the command line, or an object."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optimizer.errors import ModelError, OptionError, UnsupportedError
from optimizer.frontends.onnx_export import (
    Signature,
    check_opset,
    one_line,
    require,
    trace,
    write,
)

_LOG = logging.getLogger(__name__)

_EXPECTED = "expected (module, example_inputs) or (module, example_inputs, dynamic_shapes)"


def export_torch(
    spec_or_module: Any,
    out_dir: Path,
    *,
    example_inputs: Any = None,
    opset: int = 23,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Path:
    """Export a module to ``out_dir``.

    Axes are dynamic as ``dynamic_shapes`` says. Without it, axis 0 of every tensor input is tried
    as a dynamic batch, and all sizes are fixed where torch cannot export that.

    Args:
        spec_or_module: ``package.module:factory`` or a ``torch.nn.Module``. The factory is called
            without arguments, with the current folder importable.
        out_dir: folder for the ONNX file.
        example_inputs: a tensor, a sequence of arguments or a mapping of keyword arguments; needed
            with a module object, and overrides the factory's.
        opset: ONNX opset, 18 to 24.
        dynamic_shapes: as in ``torch.export.export``; axis names may be strings.
        input_names: names of the graph inputs; by default those of ``forward``'s parameters.
        output_names: names of the graph outputs.

    Returns:
        Path of the ONNX file, named after the factory or the module's class.

    Raises:
        MissingDependencyError: torch is not installed.
        ModelError: the factory cannot be found or run, or returns something else.
        OptionError: example inputs are missing or of a wrong type.
        UnsupportedError: torch cannot export the module.
    """
    check_opset(opset)
    require("torch")
    import torch

    name = None
    if isinstance(spec_or_module, str):
        module, inputs, shapes = _call_factory(spec_or_module)
        name = spec_or_module.rpartition(":")[2].rpartition(".")[2]
        example_inputs = inputs if example_inputs is None else example_inputs
        dynamic_shapes = shapes if dynamic_shapes is None else dynamic_shapes
    else:
        module = spec_or_module
    if not isinstance(module, torch.nn.Module):
        raise ModelError(
            f"cannot export a {type(module).__name__}: expected a torch.nn.Module "
            "or the text package.module:factory"
        )
    args = _arguments(module, example_inputs)
    stem = re.sub(r"\W+", "-", name or type(module).__name__).strip("-") or "model"
    path = Path(out_dir) / f"{stem}.onnx"
    names = list(input_names) if input_names is not None else None
    outputs = list(output_names) if output_names is not None else None
    if dynamic_shapes is not None:
        signature = Signature(args, _positional(module, dynamic_shapes), names, outputs)
        return write(trace(module, signature, opset), path)
    batch = torch.export.Dim("batch")
    dynamic = tuple(_leading_axis(arg, batch) for arg in args)
    try:
        model = trace(module, Signature(args, dynamic, names, outputs), opset)
    except UnsupportedError as error:
        _LOG.info("a dynamic batch is not possible, all sizes are fixed: %s", error)
        model = trace(module, Signature(args, None, names, outputs), opset)
    return write(model, path)


def _call_factory(spec: str) -> tuple[Any, Any, Any]:
    """Import and call ``package.module:factory``.

    Raises:
        ModelError: no such module or factory, it fails, or it returns something else.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ModelError(f"'{spec}': expected package.module:factory")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        target: Any = _import(spec, module_name)
        for part in attribute.split("."):
            if not hasattr(target, part):
                raise ModelError(_no_attribute(spec, target, part))
            target = getattr(target, part)
        if not callable(target):
            raise ModelError(
                f"'{spec}' is a {type(target).__name__}, expected a function that "
                "takes no arguments and returns (module, example_inputs)"
            )
        try:
            made = target()
        except Exception as error:
            _LOG.debug("factory failed", exc_info=True)
            raise ModelError(f"'{spec}' failed when called: {one_line(error)}") from error
    finally:
        if added:
            sys.path.remove(here)
    return _unpack(spec, made)


def _import(spec: str, module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise ModelError(
                f"'{spec}': no module named {missing} in {Path.cwd()} or among the installed "
                "packages; run from the folder that holds it"
            ) from error
        raise ModelError(f"'{spec}': importing {module_name} needs {missing}") from error
    except Exception as error:
        raise ModelError(f"'{spec}': importing {module_name} fails: {one_line(error)}") from error


def _no_attribute(spec: str, target: Any, part: str) -> str:
    public = [name for name in dir(target) if not name.startswith("_")]
    close = difflib.get_close_matches(part, public, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"'{spec}': {getattr(target, '__name__', target)} has no '{part}'{hint}"


def _unpack(spec: str, made: Any) -> tuple[Any, Any, Any]:
    import torch

    if not isinstance(made, tuple) or len(made) not in (2, 3):
        found = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise ModelError(f"'{spec}' returned {found}; {_EXPECTED}")
    if not isinstance(made[0], torch.nn.Module):
        raise ModelError(
            f"'{spec}' returned {type(made[0]).__name__} in the first place; {_EXPECTED}"
        )
    return made[0], made[1], made[2] if len(made) == 3 else None


def _arguments(module: Any, example_inputs: Any) -> tuple[Any, ...]:
    """The positional arguments of ``forward``.

    Raises:
        OptionError: there are none, they do not fit the parameters, or no tensor is among them.
    """
    import torch

    if example_inputs is None:
        raise OptionError(
            f"{type(module).__name__} needs example_inputs: a tensor, a tuple of arguments "
            "or a dict of keyword arguments, from which torch learns the graph"
        )
    if isinstance(example_inputs, torch.Tensor):
        args: tuple[Any, ...] = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        args = _by_parameter(module, example_inputs, "example_inputs")
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    else:
        raise OptionError(
            f"example_inputs is a {type(example_inputs).__name__}: expected a tensor, "
            "a tuple of arguments or a dict of keyword arguments"
        )
    if not any(isinstance(leaf, torch.Tensor) for leaf in _leaves(args)):
        raise OptionError(f"example_inputs of {type(module).__name__} hold no tensor")
    return args


def _by_parameter(module: Any, values: Mapping[str, Any], what: str) -> tuple[Any, ...]:
    """Order keyword values by ``forward``'s parameters; those before the last get defaults."""
    parameters = inspect.signature(module.forward).parameters
    for name in values:
        if name not in parameters:
            close = difflib.get_close_matches(name, list(parameters), n=1)
            hint = f"; did you mean '{close[0]}'?" if close else f": {', '.join(parameters)}"
            raise OptionError(
                f"{what} names '{name}', which is no parameter of "
                f"{type(module).__name__}.forward{hint}"
            )
    ordered: list[Any] = []
    wanted = set(values)
    for name, parameter in parameters.items():
        if not wanted:
            break
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        ordered.append(values.get(name, default))
        wanted.discard(name)
    return tuple(ordered)


def _positional(module: Any, dynamic_shapes: Any) -> Any:
    """Keyword shapes in ``forward``'s order; the rest as given."""
    if isinstance(dynamic_shapes, Mapping):
        return _by_parameter(module, dynamic_shapes, "dynamic_shapes")
    return tuple(dynamic_shapes)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _leading_axis(value: Any, dim: Any) -> Any:
    """``dynamic_shapes`` of one argument: axis 0 of each tensor in it."""
    import torch

    if isinstance(value, torch.Tensor):
        return {0: dim} if value.ndim else {}
    if isinstance(value, Mapping):
        return {key: _leading_axis(item, dim) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_leading_axis(item, dim) for item in value)
    return None
