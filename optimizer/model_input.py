"""What a model must satisfy before anything is done with it.

Each check raises an error that names the node or tensor; ``model_io.load_model`` puts the file's
name in front. Only ``sort_nodes`` changes the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from optimizer.errors import MissingDependencyError, ModelError, UnsupportedError

#: The newest opset the canonical dialect and the targets' forms are written for.
MAX_OPSET = 24
#: Domains whose operators ONNX Runtime brings along.
RUNTIME_DOMAINS = ("com.microsoft", "com.microsoft.nchwc")
#: Operators that ONNX Runtime adds to the standard domain, at any opset.
RUNTIME_OPERATORS = ("LayerNormalization", "SimplifiedLayerNormalization")
STANDARD_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview.training", "ai.onnx.training")

# Operators whose constant operands are weights: an infinite number there makes every output NaN or
# infinite, while an infinite constant elsewhere may be an attention mask.
_WEIGHT_USERS = frozenset(
    {
        "MatMul",
        "Gemm",
        "Conv",
        "ConvTranspose",
        "Gather",
        "LayerNormalization",
        "RMSNormalization",
        "MatMulInteger",
        "DequantizeLinear",
    }
)
_CHUNK = 1 << 18  # elements looked at together: fits a second-level cache
_RAGGED = {ir.DataType.STRING, ir.DataType.UNDEFINED}


def check_versions(model: ir.Model) -> None:
    """Refuse models of a newer standard than this program knows.

    Raises:
        ModelError: The model imports no operator set.
        UnsupportedError: The opset or the IR version is too new.
    """
    opset = model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx"))
    if opset is None and any(node.domain in ("", "ai.onnx") for node in model.graph):
        msg = "imports no operator set; expected an opset_import of the standard operators"
        raise ModelError(msg)
    if opset is not None and opset > MAX_OPSET:
        msg = f"uses opset {opset}, the newest supported is {MAX_OPSET}; export it with opset 23"
        raise UnsupportedError(msg)
    newest = int(onnx.IR_VERSION)
    if model.ir_version > newest:
        msg = (
            f"has IR version {model.ir_version}, the installed onnx {onnx.__version__} knows "
            f"{newest}; install a newer onnx or export with an older one"
        )
        raise UnsupportedError(msg)


def check_operators(model: ir.Model, custom_ops: Sequence[Path]) -> None:
    """Every operator is standard, of ONNX Runtime, a function of the model, or in a library.

    Raises:
        ModelError: A standard domain has no such operator at the model's opset.
        MissingDependencyError: An operator of a domain nobody here implements.
    """
    functions = {(identifier[0], identifier[1]) for identifier in model.functions}
    for node in model.graph.all_nodes():
        domain = "" if node.domain == "ai.onnx" else node.domain
        if (node.domain, node.op_type) in functions or domain in RUNTIME_DOMAINS:
            continue
        if domain not in STANDARD_DOMAINS:
            if custom_ops:
                continue
            msg = (
                f"node '{node.name}' is operator {node.op_type} of domain '{node.domain}', which "
                "neither ONNX nor ONNX Runtime defines; give its library with --custom-ops LIB"
            )
            raise MissingDependencyError(msg)
        opset = model.graph.opset_imports.get(domain) or 1
        if domain == "" and node.op_type in RUNTIME_OPERATORS:
            continue
        if not onnx.defs.has(node.op_type, opset, domain):
            msg = (
                f"node '{node.name}' is operator {node.op_type}, which opset {opset} of domain "
                f"'{domain or 'ai.onnx'}' does not define; check the model with onnx.checker"
            )
            raise ModelError(msg)


def check_wiring(model: ir.Model) -> None:
    """Every value that is read exists, and no node waits for itself.

    Raises:
        ModelError: A dangling input or output, or a cycle.
    """
    for node in model.graph.all_nodes():
        for index, value in enumerate(node.inputs):
            if value is not None and not _is_defined(value):
                msg = (
                    f"input {index} of node '{node.name}' ({node.op_type}) reads '{value.name}', "
                    "which no node, input or initializer defines"
                )
                raise ModelError(msg)
    for value in model.graph.outputs:
        if not _is_defined(value):
            msg = f"graph output '{value.name}' is not defined by any node"
            raise ModelError(msg)
    cycle = find_cycle(model.graph)
    if cycle:
        names = " -> ".join(f"'{node.name or node.op_type}'" for node in cycle[:4])
        more = " -> ..." if len(cycle) > 4 else f" -> '{cycle[0].name or cycle[0].op_type}'"
        msg = f"the graph has a cycle: {names}{more}; expected a graph without cycles"
        raise ModelError(msg)


def _is_defined(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """The values a node reads, those of its subgraphs included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            for inner in attribute.as_graph():
                yield from _reads(inner)


def find_cycle(graph: ir.Graph) -> list[ir.Node]:
    """The nodes of one cycle in order, or an empty list."""
    done: set[ir.Node] = set()
    for root in graph:
        if root in done:
            continue
        path: dict[ir.Node, None] = {}
        stack: list[tuple[ir.Node, Iterator[ir.Node]]] = [(root, _before(root, graph))]
        path[root] = None
        while stack:
            node, remaining = stack[-1]
            below = next((item for item in remaining if item not in done), None)
            if below is None:
                stack.pop()
                path.pop(node)
                done.add(node)
            elif below in path:
                nodes = list(path)
                return nodes[nodes.index(below) :][::-1]
            else:
                path[below] = None
                stack.append((below, _before(below, graph)))
    return []


def sort_nodes(model: ir.Model) -> bool:
    """Bring nodes after what they read; returns whether any was not.

    The standard demands that order, runtimes do not, and some converters do not keep to it.
    """
    written: set[ir.Node] = set()
    for node in model.graph:
        if any(before not in written for before in _before(node, model.graph)):
            model.graph.sort()
            return True
        written.add(node)
    return False


def _before(node: ir.Node, graph: ir.Graph) -> Iterator[ir.Node]:
    for value in _reads(node):
        producer = value.producer()
        if producer is not None and producer.graph is graph:
            yield producer


def check_tensors(model: ir.Model) -> None:
    """The bytes of every initializer fit its type and shape.

    Raises:
        ModelError: Missing or extra bytes, or a negative dimension.
    """
    for value in _initializers(model):
        tensor = value.const_value
        if not isinstance(tensor, ir.serde.TensorProtoTensor) or tensor.dtype in _RAGGED:
            continue
        raw = tensor.raw
        dims = tuple(raw.dims)
        held = len(raw.raw_data)
        if any(dim < 0 for dim in dims) or (held and held != tensor.nbytes):
            msg = (
                f"initializer '{value.name}' of shape {list(dims)} and type {tensor.dtype.name} "
                f"holds {held} bytes, expected {tensor.nbytes}"
            )
            raise ModelError(msg)


def check_numbers(model: ir.Model) -> None:
    """No weight is NaN, and none that multiplies an activation is infinite.

    Reads all weights once, a quarter of a million numbers at a time.

    Raises:
        ModelError: With the tensor and how many of its numbers are not finite.
    """
    for value in _initializers(model):
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 16:
            continue
        nan, infinite = _count_non_finite(tensor.numpy())
        if isinstance(tensor, ir.ExternalTensor):
            _close(tensor)
        is_weight = any(use.node.op_type in _WEIGHT_USERS for use in value.uses())
        if nan or (infinite and is_weight):
            what = f"{nan} NaN" if nan else f"{infinite} infinite"
            msg = (
                f"initializer '{value.name}' {list(tensor.shape)} holds {what} of {tensor.size} "
                "numbers; expected finite weights: export the model again from a sound checkpoint"
            )
            raise ModelError(msg)


def _count_non_finite(array: np.ndarray) -> tuple[int, int]:
    """How many numbers are NaN, and how many infinite."""
    flat = np.ravel(array)
    nan = infinite = 0
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        if not np.isfinite(chunk).all():
            nan += int(np.isnan(chunk).sum())
            infinite += int(np.isinf(chunk).sum())
    return nan, infinite


def _close(tensor: ir.ExternalTensor) -> None:
    try:
        tensor.release()
    except BufferError:  # somebody else still holds the array
        return


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from graph.initializers.values()
