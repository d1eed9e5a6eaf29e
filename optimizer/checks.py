"""What a legal graph is, stated once; checked after every pass."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import ClassVar, Protocol

import onnx
import onnx_ir as ir

from optimizer.errors import PassContractError
from optimizer.fingerprint import Fingerprint, fingerprint
from optimizer.graph import attribute_graphs
from optimizer.proto import skeleton
from optimizer.targets import get_target

__all__ = [
    "Fingerprint",
    "check_graph",
    "check_model",
    "check_pass",
    "fingerprint",
    "onnx_problem",
]

#: Domains of operators that the ONNX standard defines.
STANDARD_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml"})
_CONTRIB = "com.microsoft"

Operator = tuple[str, str]


class PassLike(Protocol):
    """What is checked of a pass (see ``pass_base.GraphPass``)."""

    name: ClassVar[str]
    emits: tuple[Operator, ...]
    breaks: frozenset[str]


class ReportLike(Protocol):
    """What is checked of a report (see ``pass_base.Report``)."""

    @property
    def modified(self) -> bool:
        """Whether the pass says that it changed the graph."""
        ...


def check_pass(before: ir.Model, after: ir.Model, graph_pass: PassLike, report: ReportLike) -> None:
    """Compare a model before and after a pass.

    Args:
        before: A clone taken before the pass ran.
        after: The rewritten model.
        graph_pass: Its ``breaks`` may name "inputs" and "outputs", or "input types" and "output
            types"; its ``emits`` the operators it may add beyond those of the standard.
        report: What it says it did.

    Raises:
        PassContractError: The first violation; names the pass and the node or value.
    """
    where = f"pass '{graph_pass.name}'"
    change = fingerprint(before).difference(fingerprint(after))
    if change is None:
        # The same graph has the same interface and is as legal as it was.
        if report.modified and not _shapes_differ(before, after):
            raise PassContractError(f"{where} reports modified=True, but nothing changed.")
        return
    if not report.modified:
        raise PassContractError(f"{where} reports modified=False, but {change}.")
    breaks = graph_pass.breaks
    for kind in ("input", "output"):
        old, new = (_interface(model.graph, kind) for model in (before, after))
        if f"{kind}s" not in breaks:
            _check_interface(old, new, kind, where, types=f"{kind} types" not in breaks)
    repeated = {name for name, count in _node_names(before).items() if count > 1}
    check_graph(after, where, operators={*_operators(before), *graph_pass.emits}, repeated=repeated)


def check_model(model: ir.Model, target: str, before: ir.Model | None = None) -> None:
    """Check a lowered model against what its target runs.

    Args:
        model: The lowered model.
        target: A name of ``optimizer.targets``.
        before: The model before it was lowered; names of nodes that were double there may be.

    Raises:
        PassContractError: The graph is not legal, or holds operators that the target lacks.
    """
    chosen = get_target(target)
    where = f"legalize for '{target}'"
    operators = set(_operators(model))
    if not chosen.contrib_ops:
        operators = {op for op in operators if op[0] != _CONTRIB}
    repeated = () if before is None else [n for n, k in _node_names(before).items() if k > 1]
    check_graph(model, where, operators=operators, repeated=repeated)
    version = model.opset_imports.get("", 0)
    # A model that could not be raised keeps its version; runtimes take old ones.
    if version > chosen.max_opset:
        raise PassContractError(
            f"{where}: the result has opset {version}, the target takes at most {chosen.max_opset}."
        )


def check_graph(
    model: ir.Model,
    where: str,
    *,
    operators: Collection[Operator] = (),
    repeated: Collection[str] = (),
) -> None:
    """Check that a graph is legal by itself.

    Every value read exists, nodes are sorted, names are unique, every operator is of the standard
    or in ``operators``, and the ONNX checker accepts every node. Weights are not read.

    Args:
        model: Its main graph and functions are checked.
        where: Begin of the message.
        operators: Operators allowed besides those of the standard.
        repeated: Node names that may occur more than once.

    Raises:
        PassContractError: The first violation.
    """
    _check_values(model.graph, where)
    for name, count in _node_names(model).items():
        if count > 1 and name not in repeated:
            raise PassContractError(f"{where}: {count} nodes are called '{name}'.")
    allowed = set(operators) | {(f.domain, f.name) for f in model.functions.values()}
    for node in _all_nodes(model.graph):
        if node.domain not in STANDARD_DOMAINS and (node.domain, node.op_type) not in allowed:
            raise PassContractError(
                f"{where}: node '{node.name}' is {node.domain}.{node.op_type}, which is neither a "
                "standard operator nor declared in the pass's 'emits'."
            )
        if node.domain not in model.opset_imports:
            raise PassContractError(
                f"{where}: node '{node.name}' ({node.op_type}) is of domain '{node.domain}', for "
                "which the model imports no opset."
            )
    problem = onnx_problem(model)
    if problem is not None:
        raise PassContractError(f"{where}: {problem}")


def _check_values(graph: ir.Graph, where: str) -> None:
    known: dict[str, ir.Value] = {}
    for value in (*graph.inputs, *graph.initializers.values()):
        name = str(value.name)
        if known.setdefault(name, value) is not value:
            raise PassContractError(f"{where}: two values are called '{name}'.")
    for name, value in graph.initializers.items():
        if name != value.name:
            raise PassContractError(
                f"{where}: initializer '{value.name}' is registered as '{name}'."
            )
        if value.const_value is None:
            raise PassContractError(f"{where}: initializer '{name}' has no data.")
    _check_nodes(graph, known, where)
    for value in graph.outputs:
        if known.get(str(value.name)) is not value:
            raise PassContractError(f"{where}: graph output '{value.name}' is computed nowhere.")


def _check_nodes(graph: ir.Graph, known: dict[str, ir.Value], where: str) -> None:
    """Walk a graph in order; ``known`` grows by what its nodes write."""
    for node in graph:
        for value in node.inputs:
            if value is not None and known.get(str(value.name)) is not value:
                raise PassContractError(
                    f"{where}: node '{node.name}' ({node.op_type}) reads "
                    f"'{value.name}', {_why_unknown(value, graph)}."
                )
        for inner in attribute_graphs(node):
            scope = dict(known)
            scope.update({str(v.name): v for v in (*inner.inputs, *inner.initializers.values())})
            _check_nodes(inner, scope, where)
        for value in node.outputs:
            name = value.name
            if not name:
                continue
            if known.setdefault(name, value) is not value:
                raise PassContractError(
                    f"{where}: node '{node.name}' ({node.op_type}) writes '{name}', a name that "
                    "another value has already."
                )


def _why_unknown(value: ir.Value, graph: ir.Graph) -> str:
    producer = value.producer()
    if producer is None:
        return "which is neither an input, an initializer nor computed by a node"
    if producer.graph is None:
        return f"whose node '{producer.name}' has been removed"
    if producer.graph is graph:
        return f"which node '{producer.name}' computes later: nodes are not sorted"
    return "which belongs to another graph"


def _interface(graph: ir.Graph, kind: str) -> Sequence[ir.Value]:
    return graph.inputs if kind == "input" else graph.outputs


def _check_interface(
    before: Sequence[ir.Value], after: Sequence[ir.Value], kind: str, where: str, *, types: bool
) -> None:
    names = [[str(v.name) for v in side] for side in (before, after)]
    if names[0] != names[1]:
        missing = [n for n in names[0] if n not in names[1]]
        added = [n for n in names[1] if n not in names[0]]
        what = f"lost {missing[0]}" if missing else f"gained {added[0]}" if added else "reordered"
        raise PassContractError(
            f"{where} changed the graph {kind}s ({what}) and does not declare it in 'breaks'."
        )
    for old, new in zip(before, after, strict=True):
        if types and old.dtype is not None and old.dtype != new.dtype:
            raise PassContractError(
                f"{where}: {kind} '{old.name}' was {old.dtype} and became {new.dtype}."
            )
        if old.shape is None:
            continue
        if new.shape is None or len(new.shape) != len(old.shape):
            raise PassContractError(
                f"{where}: {kind} '{old.name}' had shape {old.shape} and now has {new.shape}."
            )
        for axis, (a, b) in enumerate(zip(old.shape, new.shape, strict=True)):
            if isinstance(a, int) and a != b:
                raise PassContractError(
                    f"{where}: axis {axis} of {kind} '{old.name}' was {a} and became {b}."
                )


def _shapes_differ(before: ir.Model, after: ir.Model) -> bool:
    """Whether types, shapes or metadata of values differ: all that a fingerprint leaves out."""
    for a, b in zip(_values(before), _values(after), strict=False):
        if a.shape != b.shape or a.type != b.type or a.metadata_props != b.metadata_props:
            return True
    nodes = zip(_all_nodes(before.graph), _all_nodes(after.graph), strict=False)
    return any(a.metadata_props != b.metadata_props for a, b in nodes)


def _values(model: ir.Model) -> Iterable[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs


def _all_nodes(graph: ir.Graph) -> Iterable[ir.Node]:
    for node in graph:
        yield node
        for inner in attribute_graphs(node):
            yield from _all_nodes(inner)


def _node_names(model: ir.Model) -> Counter[str]:
    return Counter(node.name for node in model.graph if node.name)


def _operators(model: ir.Model) -> set[Operator]:
    return {
        (node.domain, node.op_type)
        for node in _all_nodes(model.graph)
        if node.domain not in STANDARD_DOMAINS
    }


_BAD_NODE = re.compile(r"Name: (?P<node>.*?) OpType: (?P<op>\w+)")


def onnx_problem(model: ir.Model) -> str | None:
    """What the ONNX checker says against a model, naming the node; None for nothing.

    Weights are not read, and no file is looked for.
    """
    proto, large = skeleton(model)
    # To the checker, large initializers are inputs: it would look for their bytes on disk.
    kept = [t for t in proto.graph.initializer if t.name not in large]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    inputs = {value.name for value in proto.graph.input}
    for name, tensor in large.items():
        if name not in inputs:
            info = proto.graph.input.add(name=name)
            info.type.tensor_type.elem_type = tensor.dtype.value
            info.type.tensor_type.shape.SetInParent()
    for node in proto.graph.node:  # what ONNX Runtime adds to the standard is not in the standard
        if node.op_type == "SimplifiedLayerNormalization" and not node.domain:
            node.domain = _CONTRIB
            if all(item.domain != _CONTRIB for item in proto.opset_import):
                proto.opset_import.add(domain=_CONTRIB, version=1)
    _declare_more(proto)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        text = " ".join(str(error).split("==>")[0].split())
        found = _BAD_NODE.search(str(error))
        node = f"node '{found['node']}' ({found['op']}): " if found else ""
        return f"{node}{text}"
    return None


def _declare_more(proto: onnx.ModelProto) -> None:
    """Add what the checker asks for and no runtime does: the rank of inputs and outputs.

    External tensors of attributes get another size, so that it does not look for their files.
    """
    pending = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    while pending or nodes:
        if pending:
            graph = pending.pop()
            nodes += graph.node
            for tensor in graph.initializer:
                _forget_place(tensor)
            for output in graph.output:
                if not output.HasField("type"):
                    output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
            for value in (*graph.input, *graph.output):
                if value.type.HasField("tensor_type"):
                    value.type.tensor_type.shape.SetInParent()
            continue
        for attribute in nodes.pop().attribute:
            for tensor in (*([attribute.t] if attribute.HasField("t") else ()), *attribute.tensors):
                _forget_place(tensor)
            pending += (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs)


def _forget_place(tensor: onnx.TensorProto) -> None:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.dims[:] = [0]
