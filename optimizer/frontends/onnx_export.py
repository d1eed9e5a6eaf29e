"""The step shared by all torch frontends: run torch's dynamo exporter, tidy the graph, write it.

torch names dynamic dimensions ``s10``, ``s70`` and gives every cache tensor its own symbol, and it
attaches a stack trace to every node. What leaves here has the dimension names that the caller
declared, the same name wherever the size is the same by contract, and no metadata.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optimizer.errors import ExportError, MissingDependencyError, OptionError, UnsupportedError

_LOG = logging.getLogger(__name__)

MIN_OPSET, MAX_OPSET = 18, 24
"""18 is the oldest opset torch's translations are written for, 24 the newest canonical one."""

EXTERNAL_DATA_BYTES = 1_500_000_000
"""Weights of this size and more go to a file of their own: protobuf ends at 2 GB, with a margin
for the graph itself."""


@dataclass(frozen=True)
class Signature:
    """What the exported graph looks like from outside.

    Attributes:
        args: example inputs, in the order of the module's ``forward``.
        dynamic_shapes: torch.export's description of the dynamic axes, one entry per argument.
        inputs: names of the graph inputs, in flattened order.
        outputs: names of the graph outputs.
        axes: per input name, the name of each dynamic axis.
        sums: sizes that are a sum of two named ones, as ``name: (term, term)``.
        prefix: what a wrapper put before the names of the model's weights.
    """

    args: tuple[Any, ...]
    dynamic_shapes: Any
    inputs: Sequence[str] | None
    outputs: Sequence[str] | None
    axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    sums: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    prefix: str = ""


def require(module: str) -> None:
    """Import torch or transformers, or say what to install.

    Raises:
        MissingDependencyError: it is not importable.
    """
    try:
        __import__(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{module} is needed to read this model and cannot be imported ({error}); "
            "run: pip install 'optimize-onnx[torch]'"
        ) from error


def check_opset(opset: int) -> None:
    """Refuse opsets that the exporter cannot write.

    Raises:
        OptionError: the opset is outside the supported range.
    """
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise OptionError(
            f"opset {opset} cannot be exported: expected {MIN_OPSET} to {MAX_OPSET}; "
            "leave the option out to get 23"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep everything torch and transformers say from the user, unless DEBUG logging is on.

    torch gives many of its loggers a level and a handler of their own, so that only switching
    logging off as a whole reaches them.
    """
    said = io.StringIO()
    before = logging.root.manager.disable
    if not _LOG.isEnabledFor(logging.DEBUG):
        logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                yield
    finally:
        logging.disable(before)
        if said.getvalue().strip():
            _LOG.debug("%s", said.getvalue().strip())


def one_line(error: BaseException) -> str:
    """The innermost cause of an error in one line of at most 200 characters."""
    seen = {id(error)}
    while (inner := error.__cause__) is not None and id(inner) not in seen:
        seen.add(id(inner))
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def trace(module: Any, signature: Signature, opset: int) -> ir.Model:
    """Export an evaluated module to an IR model with tidy names.

    Args:
        module: a ``torch.nn.Module``; put in eval mode here, wrappers included.
        signature: example inputs and outside names.
        opset: ONNX opset to write.

    Raises:
        UnsupportedError: torch cannot trace or translate the module.
    """
    import torch

    module.eval()
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                signature.args,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=signature.dynamic_shapes,
                input_names=list(signature.inputs) if signature.inputs else None,
                output_names=list(signature.outputs) if signature.outputs else None,
                verbose=False,
            )
    except Exception as error:
        _LOG.debug("export failed", exc_info=True)
        raise UnsupportedError(
            f"torch could not export {type(module).__name__}: {one_line(error)}"
        ) from error
    if program is None:  # pragma: no cover - torch's signature allows it, the dynamo path does not
        raise UnsupportedError(f"torch returned no program for {type(module).__name__}")
    model: ir.Model = program.model
    strip_metadata(model)
    rename_dimensions(model, signature.axes, signature.sums)
    name_weights(model, module, signature.prefix)
    return model


def strip_metadata(model: ir.Model) -> None:
    """Drop stack traces and bookkeeping.

    They hold paths of the exporting machine and make up to a tenth of a small model's size.
    """
    model.metadata_props.clear()
    model.doc_string = None
    for graph in model.graphs():
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in [*graph.inputs, *graph.initializers.values()]:
            value.metadata_props.clear()
            value.doc_string = None
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                value.doc_string = None


def name_weights(model: ir.Model, module: Any, prefix: str = "") -> None:
    """Give weights the names they have in the module, without the wrapper's prefix.

    torch folds the transpose of a linear layer's weight into a constant called ``val_76``. Reports
    speak of weights by name, so such constants are recognised by their content; their layout stays
    ``[K, N]``. Where the untransposed weight is in the graph as well, ``.T`` is appended.
    """
    weights = dict(module.named_parameters(remove_duplicate=False))
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, weight in weights.items():
        if weight.ndim == 2:
            by_shape.setdefault(tuple(reversed(weight.shape)), []).append(name)
    initializers = model.graph.initializers
    taken = set(initializers) & set(weights)
    for value in list(initializers.values()):
        if value.name in weights or value.const_value is None:
            continue
        candidates = by_shape.get(tuple(value.const_value.shape.numpy()), [])
        if not candidates or value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            continue
        array = value.const_value.numpy().T
        matches = [name for name in candidates if _same(array, weights[name])]
        if matches:
            shared = [name for name in matches if name in taken]
            name = f"{shared[0]}.T" if shared else matches[0]
            if name not in initializers:
                value.name = name
                taken.add(name)
    for value in list(initializers.values()):
        short = (value.name or "").removeprefix(prefix)
        if short and short != value.name and short not in initializers:
            value.name = short


def _same(array: np.ndarray, weight: Any) -> bool:
    """Whether a constant and a parameter are equal; corners first, since most pairs differ."""
    other = weight.detach().cpu().numpy()
    corners = array[0, 0] == other[0, 0] and array[-1, -1] == other[-1, -1]
    return bool(corners) and np.array_equal(array, other)


def rename_dimensions(
    model: ir.Model,
    axes: Mapping[str, Mapping[int, str]],
    sums: Mapping[str, tuple[str, str]],
) -> None:
    """Replace the exporter's symbols by the declared names in all shapes of the graph.

    Where torch proved two declared axes equal (one symbol for both), the first declared name is
    used for both. Symbols of inputs declared under one name become one name: the caller's contract.
    """
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, name in axes.get(value.name or "", {}).items():
            dim = value.shape[axis] if value.shape is not None else None
            symbol = dim.value if isinstance(dim, ir.SymbolicDim) else None
            if symbol and symbol.isidentifier():
                names.setdefault(symbol, name)
    sorted_sums = {" + ".join(sorted(terms)): name for name, terms in sums.items()}

    def renamed(symbol: str) -> str:
        text = re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m.group(), m.group()), symbol)
        terms = " + ".join(sorted(term.strip() for term in text.split("+")))
        return sorted_sums.get(terms, text)

    values: list[ir.Value] = list(model.graph.inputs)
    for graph in model.graphs():
        values.extend(output for node in graph for output in node.outputs)
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                renamed(dim.value) if isinstance(dim, ir.SymbolicDim) and dim.value else dim
                for dim in value.shape
            )
    for value in model.graph.inputs:
        if value.shape is not None and not value.shape.frozen:
            for axis, name in axes.get(value.name or "", {}).items():
                dim = value.shape[axis]
                if isinstance(dim, ir.SymbolicDim) and not dim.value:
                    value.shape[axis] = ir.SymbolicDim(name)


def write(model: ir.Model, path: Path, *, data_name: str | None = None) -> Path:
    """Write the model next to its final place, then rename it, so that no partial file appears.

    Args:
        model: the model.
        path: final path of the ONNX file; its folder is made when missing.
        data_name: file name for the weights; None puts them inside unless they are too large.

    Raises:
        ExportError: the folder cannot be written to, or the disk is full.
    """
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    if data_name is None and weights >= EXTERNAL_DATA_BYTES:
        data_name = f"{path.name}.data"
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        ir.save(model, temporary / path.name, external_data=data_name)
        if data_name is not None and (temporary / data_name).exists():
            (temporary / data_name).replace(path.parent / data_name)
        (temporary / path.name).replace(path)
    except OSError as error:
        raise ExportError(
            f"{path}: the exported model cannot be written ({one_line(error)}); it needs about "
            f"{weights / 1e6:.0f} MB in a folder that can be written to"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return path
