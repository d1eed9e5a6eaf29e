"""Equal computations and equal small constants are kept once.

Rewrite:      y1 = f(x), y2 = f(x)  ->  y = f(x) for both
Applies when: same operator, attributes and inputs, deterministic, no subgraph, not both graph
              outputs; constants: same bytes, at most ``SMALL`` of them
Exactness:    bitwise
"""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from optimizer.graph import attribute_graphs, constant, replace_value
from optimizer.raising.base import RuleReport, allow

#: Constants above this many bytes are weights; comparing them would mean reading all of them.
SMALL = 1024

_DRAWS = frozenset(
    {
        "Bernoulli",
        "Dropout",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)


def run(model: ir.Model) -> RuleReport:
    """Merge equal constants, then equal nodes, in one sweep each."""
    return RuleReport(_merge_constants(model.graph) + _merge_nodes(model.graph))


def _merge_constants(graph: ir.Graph) -> int:
    seen: dict[Hashable, ir.Value] = {}
    count = 0
    for name, value in list(graph.initializers.items()):
        tensor = constant(value)
        if tensor is None or tensor.nbytes > SMALL or tensor.dtype == ir.DataType.STRING:
            continue
        key = (tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes())
        first = seen.setdefault(key, value)
        if first is not value and not value.is_graph_output() and allow(name):
            replace_value(value, first)
            del graph.initializers[name]
            count += 1
    return count


def _merge_nodes(graph: ir.Graph) -> int:
    seen: dict[Hashable, ir.Node] = {}
    count = 0
    for node in graph:
        key = _key(node)
        if key is None:
            continue
        first = seen.setdefault(key, node)
        if first is node:
            continue
        pairs = list(zip(first.outputs, node.outputs, strict=True))
        if any(new.is_graph_output() and old.is_graph_output() for new, old in pairs):
            continue
        if any(not new.name and (old.uses() or old.is_graph_output()) for new, old in pairs):
            continue  # an output that the first node leaves out
        if not allow(node):
            continue
        for new, old in pairs:
            replace_value(old, new)
        graph.remove(node, safe=True)
        count += 1
    return count


def _key(node: ir.Node) -> Hashable | None:
    if node.op_type in _DRAWS or any(True for _ in attribute_graphs(node)):
        return None
    attributes = []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.is_ref():
            return None
        value = attribute.value
        if attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.nbytes > SMALL or tensor.dtype == ir.DataType.STRING:
                return None
            value = (tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes())
        elif not isinstance(value, Hashable):
            return None
        attributes.append((name, attribute.type, value))
    identity = (node.domain, node.op_type, node.overload, len(node.outputs))
    return identity, tuple(node.inputs), tuple(attributes)
