"""What a model must satisfy before anything is done with it.

Each check raises an error that names the node or tensor; ``model_io.load_model`` puts the file's
name in front. Only ``sort_nodes`` changes the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from optimizer.checks import onnx_problem
from optimizer.errors import MissingDependencyError, ModelError, UnsupportedError
from optimizer.graph import attribute_graphs, constant
from optimizer.model_functions import all_nodes, required_inputs

#: The newest opset the canonical dialect and the targets' forms are written for.
MAX_OPSET = 24
_TYPES = frozenset(dtype.value for dtype in ir.DataType if dtype is not ir.DataType.UNDEFINED)
#: Domains whose operators ONNX Runtime brings along.
RUNTIME_DOMAINS = ("com.microsoft", "com.microsoft.nchwc")
#: Operators that ONNX Runtime adds to the standard domain, at any opset.
RUNTIME_OPERATORS = ("LayerNormalization", "SimplifiedLayerNormalization")
#: Types of their attributes that are read here; the ONNX checker does not know these operators.
RUNTIME_ATTRIBUTES = {
    **dict.fromkeys(
        (
            "axis", "channels_last", "do_rotary", "interleaved", "is_packed_batching",
            "kv_num_heads", "num_heads", "past_present_share_buffer", "rotary_embedding_dim",
            "transA", "transB", "transBatchA", "transBatchB", "unidirectional",
        ),
        ir.AttributeType.INT,
    ),
    **dict.fromkeys(
        (
            "activation_alpha", "activation_beta", "activation_gamma", "alpha", "beta", "epsilon",
            "mask_filter_value", "scale", "softcap",
        ),
        ir.AttributeType.FLOAT,
    ),
    **dict.fromkeys(
        ("dilations", "kernel_shape", "pads", "qkv_hidden_sizes", "strides"),
        ir.AttributeType.INTS,
    ),
    **dict.fromkeys(("activation", "auto_pad"), ir.AttributeType.STRING),
}  # fmt: skip
#: Their inputs that must be there; of the others the first.
RUNTIME_INPUTS = {
    "BiasGelu": (0, 1),
    "DynamicQuantizeMatMul": (0, 1, 2),
    "EmbedLayerNormalization": (0, 2, 3, 5, 6),
    "FusedConv": (0, 1),
    "FusedGemm": (0, 1),
    "FusedMatMul": (0, 1),
    "GroupQueryAttention": (0, 5, 6),
    "MatMulIntegerToFloat": (0, 1, 2, 3),
    "RotaryEmbedding": (0, 1, 2, 3),
    "SimplifiedLayerNormalization": (0, 1),
    "SkipLayerNormalization": (0, 1, 2),
    "SkipSimplifiedLayerNormalization": (0, 1, 2),
}
STANDARD_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview.training", "ai.onnx.training")

#: What these give holds the same numbers.
_CARRIED = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
# Operators whose constant operands are weights: an infinite number there makes every output NaN or
# infinite, while an infinite constant elsewhere may be an attention mask.
_WEIGHT_USERS = frozenset(
    {
        "Conv", "ConvTranspose", "DequantizeLinear", "FusedConv", "FusedGemm", "FusedMatMul",
        "Gather", "Gemm", "LayerNormalization", "MatMul", "MatMulInteger", "RMSNormalization",
        "SimplifiedLayerNormalization", "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)  # fmt: skip
_CHUNK = 1 << 18  # elements looked at together: fits a second-level cache


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


def check_names(proto: onnx.ModelProto) -> None:
    """Every value of a graph is defined once: afterwards a name stands for one value.

    Raises:
        ModelError: A name that two nodes, inputs or initializers share.
    """
    bodies: list[tuple[Sequence[str], Sequence[onnx.NodeProto]]] = [
        (_given(proto.graph), proto.graph.node)
    ]
    bodies += [(tuple(function.input), function.node) for function in proto.functions]
    while bodies:
        given, nodes = bodies.pop()
        known: set[str] = set()
        written = (name for node in nodes for name in node.output if name)
        for name in (*given, *written):
            if name in known:
                msg = f"defines value '{name}' twice; expected one node, input or initializer"
                raise ModelError(msg)
            known.add(name)
        for node in nodes:
            for attribute in node.attribute:
                inner = (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs)
                bodies += [(_given(graph), graph.node) for graph in inner]


def _given(graph: onnx.GraphProto) -> tuple[str, ...]:
    """Names of what a graph reads: inputs, and initializers that are not inputs with a default."""
    inputs = [value.name for value in graph.input]
    held = [tensor.name for tensor in graph.initializer]
    held += [sparse.values.name for sparse in graph.sparse_initializer]
    if "" in inputs or "" in held:
        msg = f"holds an input or initializer without a name in graph '{graph.name}'"
        raise ModelError(msg)
    repeated = set(inputs)
    return (*inputs, *(n for n in dict.fromkeys(held) if n not in repeated), *_doubles(held))


def _doubles(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def check_nodes(model: ir.Model) -> None:
    """Every node has what its operator requires, and the ONNX checker accepts it.

    Raises:
        ModelError: Names the node and what is wrong with it.
    """
    for node in model.graph.all_nodes():
        if node.domain not in model.opset_imports:
            msg = (
                f"node '{node.name}' ({node.op_type}) is of domain '{node.domain}', for which the "
                "model imports no operator set"
            )
            raise ModelError(msg)
        if any(attribute.is_ref() for attribute in node.attributes.values()):
            msg = f"node '{node.name}' ({node.op_type}) refers to an attribute of no function"
            raise ModelError(msg)
        _check_node(node, model.opset_imports)
    for function in model.functions.values():
        for node in function.all_nodes():
            _check_node(node, function.opset_imports)
    problem = onnx_problem(model)
    if problem is not None:
        raise ModelError(f"is not a valid model: {problem}")


def _check_node(node: ir.Node, imports: Mapping[str, int]) -> None:
    """What the ONNX checker leaves out: required inputs, and attributes that stand for a type."""
    opset = imports.get(node.domain, 1)
    needed = [(index, f", {name}") for index, name in required_inputs(node, opset)]
    if is_runtime_operator(node):
        needed = [(index, "") for index in RUNTIME_INPUTS.get(node.op_type, (0,))]
    for index, name in needed:
        if index >= len(node.inputs) or node.inputs[index] is None:
            msg = f"node '{node.name}' ({node.op_type}) lacks its input {index}{name}"
            raise ModelError(msg)
    for name, attribute in node.attributes.items() if node.domain in RUNTIME_DOMAINS else ():
        expected = RUNTIME_ATTRIBUTES.get(name, attribute.type)
        if attribute.type != expected:
            msg = (
                f"node '{node.name}' ({node.op_type}) has the attribute '{name}' as "
                f"{attribute.type.name}, expected {expected.name}"
            )
            raise ModelError(msg)
    if node.domain == "" and node.op_type == "Constant" and len(node.attributes) != 1:
        msg = f"node '{node.name}' (Constant) has {len(node.attributes)} values, expected one"
        raise ModelError(msg)
    to = node.attributes.get("to") if node.domain == "" and node.op_type == "Cast" else None
    if to is not None and not to.is_ref() and to.value not in _TYPES:
        msg = f"node '{node.name}' (Cast) is to element type {to.value}, which does not exist"
        raise ModelError(msg)


def is_runtime_operator(node: ir.Node) -> bool:
    """Whether a node is of an operator that only ONNX Runtime defines."""
    own = node.domain == "" and node.op_type == "SimplifiedLayerNormalization"
    return own or node.domain in RUNTIME_DOMAINS


def check_operators(model: ir.Model, custom_ops: Sequence[Path]) -> None:
    """Every operator is standard, of ONNX Runtime, a function of the model, or in a library.

    Raises:
        ModelError: A standard domain has no such operator at the model's opset.
        MissingDependencyError: An operator of a domain nobody here implements.
    """
    functions = {(identifier[0], identifier[1]) for identifier in model.functions}
    for node in all_nodes(model):
        domain = node.domain
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
    for node in all_nodes(model):
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
    graphs = (model.graph, *model.graph.subgraphs())
    cycle = next((found for graph in graphs if (found := find_cycle(graph))), None)
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
    for graph in attribute_graphs(node):
        for inner in graph.all_nodes():
            yield from (value for value in inner.inputs if value is not None)
        yield from graph.outputs


def is_sorted(graph: ir.Graph) -> bool:
    """Whether every node comes after those whose results it reads."""
    seen: set[ir.Node] = set()
    for node in graph:
        if any(producer not in seen for producer in _before(node, graph)):
            return False
        seen.add(node)
    return True


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
    if all(map(is_sorted, (model.graph, *model.graph.subgraphs()))):
        return False
    model.graph.sort()
    return True


def _before(node: ir.Node, graph: ir.Graph) -> Iterator[ir.Node]:
    for value in _reads(node):
        producer = value.producer()
        if producer is not None and producer.graph is graph:
            yield producer


def check_numbers(model: ir.Model) -> None:
    """No weight is NaN, and none that multiplies an activation is infinite.

    Reads all weights once, a quarter of a million numbers at a time.

    Raises:
        ModelError: With the tensor and how many of its numbers are not finite.
    """
    for value in (*_initializers(model), *_constants(model)):
        tensor = value.const_value if value.is_initializer() else constant(value)
        if tensor is None or not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 8:
            continue
        nan, infinite = _count_non_finite(tensor.numpy())
        if isinstance(tensor, ir.ExternalTensor):
            _close(tensor)
        if nan or (infinite and _is_weight(value)):
            what = f"{nan} NaN" if nan else f"{infinite} infinite"
            kind = "initializer" if value.is_initializer() else "Constant"
            msg = (
                f"{kind} '{value.name}' {list(tensor.shape)} holds {what} of {tensor.size} "
                "numbers; expected finite weights: export the model again from a sound checkpoint"
            )
            raise ModelError(msg)


def _is_weight(value: ir.Value) -> bool:
    """Whether an operator that takes weights reads it, perhaps in another shape or type."""
    pending, seen = [value], {value}
    while pending:
        for use in pending.pop().uses():
            if use.node.op_type in _WEIGHT_USERS:
                return True
            output = use.node.outputs[0] if use.node.op_type in _CARRIED else None
            if output is not None and output not in seen:
                seen.add(output)
                pending.append(output)
    return False


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


def _constants(model: ir.Model) -> Iterator[ir.Value]:
    for node in all_nodes(model):
        if node.op_type == "Constant" and node.domain == "" and len(node.outputs) == 1:
            yield node.outputs[0]
