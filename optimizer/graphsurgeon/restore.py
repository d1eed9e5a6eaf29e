"""Puts back what onnx-graphsurgeon does not carry: metadata, order, names, unread initializers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, MutableSequence, Sequence

import numpy as np
import onnx_ir as ir

from optimizer.errors import ScriptError

_FLOATS = (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS)


def put_back(before: ir.Model, after: ir.Model) -> None:
    """Restore what onnx-graphsurgeon does not carry, where it still has a place."""
    after.metadata_props.update(before.metadata_props)
    after.doc_string = before.doc_string
    _put_back_values(before, after)
    # By what they write, because names of nodes may be missing and need not be unique.
    nodes = {(node.op_type, _written(node)): node for node in after.graph.all_nodes()}
    for node in before.graph.all_nodes():
        same = nodes.get((node.op_type, _written(node)))
        if same is not None:
            same.metadata_props.update(node.metadata_props)
            same.doc_string = node.doc_string
            _put_back_floats(node, same)
    _name_apart(before, after)
    try:
        if not _is_sorted(after.graph):  # scripts append their nodes at the end
            after.graph.sort()
    except ValueError as error:
        msg = f"the function left a cycle: {error}; correct it"
        raise ScriptError(msg) from error


def _written(node: ir.Node) -> tuple[str, ...]:
    return tuple(str(value.name) for value in node.outputs)


def _put_back_floats(before: ir.Node, after: ir.Node) -> None:
    """Attributes that are the same numbers, which protobuf rounds to 32 bits on the way."""
    for name, old in before.attributes.items():
        new = after.attributes.get(name)
        if new is None or old.type not in _FLOATS or old.is_ref() or new.type != old.type:
            continue
        if np.array_equal(np.float32(old.value), np.float32(new.value)):
            after.attributes[name] = old


def _put_back_values(before: ir.Model, after: ir.Model) -> None:
    old, new = before.graph, after.graph
    new.metadata_props.update(old.metadata_props)
    for name, value in old.initializers.items():
        # What nothing reads is not exported.
        if not value.uses() and not value.is_graph_output() and name not in new.initializers:
            kept = ir.Value(name=name, type=value.type, shape=value.shape)
            kept.const_value = value.const_value
            new.initializers.add(kept)
    named = {value.name for value in new.inputs}
    for value in old.inputs:
        # onnx-graphsurgeon takes an input that has a default value for a constant.
        default = new.initializers.get(str(value.name))
        if value.is_initializer() and value.name not in named and default is not None:
            new.inputs.append(default)
    _restore_order(old.inputs, new.inputs)
    _restore_order(old.outputs, new.outputs)
    known = {value.name: value for value in _values(new)}
    for value in _values(old):
        same = known.get(value.name)
        if same is not None:
            same.metadata_props.update(value.metadata_props)
            same.type = same.type or value.type
            same.shape = value.shape if same.shape is None else same.shape


def _restore_order(old: Sequence[ir.Value], new: MutableSequence[ir.Value]) -> None:
    """The order that callers may rely on, if the names are still the same."""
    by_name = {value.name: value for value in new}
    names = [value.name for value in old]
    if by_name.keys() == set(names) and len(new) == len(names):
        new[:] = [by_name[name] for name in names]


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _name_apart(before: ir.Model, after: ir.Model) -> None:
    """Give nodes that a script named alike names of their own."""
    repeated = Counter(node.name for node in before.graph if node.name)
    seen: Counter[str] = Counter()
    taken = {node.name for node in after.graph}
    for node in after.graph:
        name = node.name or ""
        seen[name] += 1
        if name and seen[name] > max(repeated[name], 1):
            numbers = (f"{name}_{index}" for index in itertools.count(seen[name]))
            node.name = next(other for other in numbers if other not in taken)
            taken.add(node.name)


def _is_sorted(graph: ir.Graph) -> bool:
    done: set[ir.Node] = set()
    for node in graph:
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer.graph is graph and producer not in done:
                return False
        done.add(node)
    return True
