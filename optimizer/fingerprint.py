"""Whether two states of a model differ, and in what, without reading its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir


@dataclass(frozen=True)
class Fingerprint:
    """What a model is, apart from shapes and metadata of its values.

    Attributes:
        header: Opsets and metadata of the model, sorted.
        nodes: One entry per node of all graphs, in order.
        tensors: Initializers by name.
    """

    header: tuple[tuple[str, Any], ...]
    nodes: tuple[tuple[Any, ...], ...]
    tensors: Mapping[str, ir.TensorProtocol]

    def difference(self, other: Fingerprint) -> str | None:
        """The first thing in which ``other`` differs, in words, or None.

        Tensors are read only where they are not the same object or the same bytes of a file.
        """
        if self.header != other.header:
            changed = sorted(dict(set(self.header) ^ set(other.header)))
            return f"{changed[0]} changed"
        for a, b in zip(self.nodes, other.nodes, strict=False):
            if a != b:
                return f"node '{b[0]}' ({b[1]}) is not what it was"
        if len(self.nodes) != len(other.nodes):
            return f"{len(other.nodes)} nodes instead of {len(self.nodes)}"
        if self.tensors.keys() != other.tensors.keys():
            names = sorted(self.tensors.keys() ^ other.tensors.keys())
            return f"initializer '{names[0]}' was added or removed"
        for name, tensor in self.tensors.items():
            if not same_tensor(tensor, other.tensors[name]):
                return f"initializer '{name}' has other numbers"
        return None

    def change(self, other: Fingerprint) -> str:
        """What became of the nodes, by operator: ``2 Mul, Add -> Sum``; empty if nothing."""
        gone, new = Counter(self.nodes), Counter(other.nodes)
        gone, new = gone - new, new - gone
        before, after = (Counter({n[1]: 0 for n in side}) for side in (gone, new))
        for counts, side in ((before, gone), (after, new)):
            for node, count in side.items():
                counts[node[1]] += count
        left, right = before - after, after - before
        if left and right:
            return f"{_listed(left)} -> {_listed(right)}"
        if left or right:
            return f"{_listed(left)} fewer" if left else f"{_listed(right)} more"
        if before:
            return f"other inputs, outputs or attributes of {_listed(before)}"
        difference = self.difference(other)
        return "" if difference is None else difference


def fingerprint(model: ir.Model) -> Fingerprint:
    """Describe ``model`` as it is now; later changes to it do not change the description."""
    header: dict[str, Any] = {f"opset '{d}'": v for d, v in model.opset_imports.items()}
    header.update({f"metadata '{k}'": v for k, v in model.metadata_props.items()})
    header["inputs of the graph"] = _names(model.graph.inputs)
    header["outputs of the graph"] = _names(model.graph.outputs)
    nodes: list[tuple[Any, ...]] = []
    for graph in _all_graphs(model):
        nodes.extend(_describe(node) for node in graph)
    tensors = {
        str(name): value.const_value
        for graph in _all_graphs(model)
        for name, value in getattr(graph, "initializers", {}).items()
        if value.const_value is not None
    }
    return Fingerprint(tuple(sorted(header.items())), tuple(nodes), tensors)


def same_tensor(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    """Whether two tensors are equal, read only if nothing cheaper decides."""
    if a is b:
        return True
    if a.dtype != b.dtype or tuple(a.shape) != tuple(b.shape):
        return False
    if isinstance(a, ir.ExternalTensor) and isinstance(b, ir.ExternalTensor):
        place_a, place_b = ((t.path, t.offset, t.length) for t in (a, b))
        if place_a == place_b:
            return True
    if a.dtype == ir.DataType.STRING:
        return np.array_equal(a.numpy(), b.numpy())
    return a.tobytes() == b.tobytes()


def _listed(counts: Counter[str]) -> str:
    """Operators and how many there are, in the order in which they come."""
    parts = [name if count == 1 else f"{count} {name}" for name, count in counts.items()]
    return ", ".join(parts)


def _names(values: Sequence[ir.Value | None]) -> tuple[str, ...]:
    return tuple("" if v is None else str(v.name) for v in values)


def _all_graphs(model: ir.Model) -> Iterator[Any]:
    roots: list[Any] = [model.graph, *model.functions.values()]
    for root in roots:
        yield root
        yield from root.subgraphs()


def _describe(node: ir.Node) -> tuple[Any, ...]:
    attributes = tuple(sorted((k, _attribute(a)) for k, a in node.attributes.items()))
    return (
        node.name,
        node.op_type,
        node.domain,
        node.overload,
        _names(node.inputs),
        _names(node.outputs),
        attributes,
    )


def _attribute(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"ref {attribute.ref_attr_name}"
    if attribute.type in {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}:
        # The nodes inside are described on their own.
        return "graph"
    if attribute.type == ir.AttributeType.TENSOR:
        return _tensor_text(attribute.as_tensor())
    if attribute.type == ir.AttributeType.TENSORS:
        return ";".join(_tensor_text(t) for t in attribute.as_tensors())
    return repr(attribute.value)


def _tensor_text(tensor: ir.TensorProtocol) -> str:
    digest = hash(np.asarray(tensor.numpy()).tobytes()) if tensor.size else 0
    return f"{tensor.dtype.name}{list(tensor.shape)}:{digest}"
