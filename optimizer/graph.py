"""Helpers every rewrite uses: constants, lazy weights, insertion, replacement, dead code.

All of them keep three promises: names stay unique, names of graph inputs and outputs never
change, and no weight is read before somebody asks for its numbers.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import onnx_ir as ir

from optimizer.arrays import contiguous_copy
from optimizer.data_files import note_source

# Names in use per graph. Only ever grows: a name once taken is not given out again, so a node
# that was removed and one that replaced it can both be talked about.
_NAMES: weakref.WeakKeyDictionary[ir.Graph, set[str]] = weakref.WeakKeyDictionary()


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of a constant, without reading it.

    Returns:
        The tensor of an initializer or ``Constant`` node; None for everything else, also for an
        initializer that is a graph input, because the caller of the model may override it.
    """
    if value is None or value.is_graph_input():
        return None
    return ir.convenience.get_const_tensor(value)


def const(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a constant, read now (look at ``value.shape`` first if it may be large)."""
    tensor = constant(value)
    return None if tensor is None else tensor.numpy()


def scalar(value: ir.Value | None) -> float | int | None:
    """The number in a constant of one element, whatever its rank."""
    tensor = constant(value)
    if tensor is None or tensor.size != 1 or tensor.dtype == ir.DataType.STRING:
        return None
    number: float | int = tensor.numpy().reshape(-1)[0].item()
    return number


def lazy(
    name: str | None,
    dtype: ir.DataType,
    shape: Sequence[int],
    fn: Callable[[], np.ndarray],
) -> ir.LazyTensor:
    """A tensor computed by ``fn`` each time it is read, and never kept.

    ``fn`` must be pure: it runs once per read, possibly long after the rewrite.
    """

    def evaluate() -> ir.TensorProtocol:
        array = fn()
        if tuple(array.shape) != tuple(shape):
            msg = f"lazy tensor '{name}' became {tuple(array.shape)}, declared {tuple(shape)}"
            raise ValueError(msg)
        return ir.Tensor(array, dtype=dtype, name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name)


def derived(
    value: ir.Value,
    shape: Sequence[int],
    fn: Callable[[np.ndarray], np.ndarray],
    dtype: ir.DataType | None = None,
) -> ir.LazyTensor:
    """A lazy tensor ``fn(numbers of the constant value)``, of element type ``dtype`` or the same.

    The result of ``fn`` is copied, and the memory map of the source is closed after each read, so
    that writing a model of any size needs the memory of its largest tensor only.

    Raises:
        ValueError: ``value`` is not a constant.
    """
    tensor = constant(value)
    if tensor is None:
        msg = f"value '{value.name}' is not a constant"
        raise ValueError(msg)

    def read() -> np.ndarray:
        result = contiguous_copy(fn(tensor.numpy()))
        release(tensor)
        return result

    made = lazy(value.name, dtype or tensor.dtype, shape, read)
    note_source(made, tensor)
    return made


def release(tensor: ir.TensorProtocol) -> None:
    """Close the memory map of an external tensor; the next read opens it again.

    Arrays handed out before stay valid: they hold the map themselves.
    """
    if isinstance(tensor, ir.ExternalTensor):
        try:
            tensor.release()
        except BufferError:  # an array is still alive somewhere; its owner closes the map
            tensor.raw = None


def unique_name(graph: ir.Graph, base: str) -> str:
    """A value name not in use in ``graph``: ``base``, or ``base_1``, ``base_2``, ...

    The name is taken by asking. For a graph inside a node, pass the outermost graph.
    """
    names = _names(graph)
    name = base
    if name in names or name in graph.initializers:
        counter = itertools.count(1)
        name = next(n for i in counter if (n := f"{base}_{i}") not in names)
    names.add(name)
    return name


def forget_names(graph: ir.Graph) -> None:
    """Look at all names again; needed after nodes were named by other means than this module."""
    _NAMES.pop(graph, None)


def _names(graph: ir.Graph) -> set[str]:
    names = _NAMES.get(graph)
    if names is None:
        values = itertools.chain(
            graph.inputs,
            graph.initializers.values(),
            (output for node in graph.all_nodes() for output in node.outputs),
            (v for sub in graph.subgraphs() for v in (*sub.inputs, *sub.initializers.values())),
        )
        names = {value.name for value in values if value.name}
        _NAMES[graph] = names
    return names


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol | np.ndarray) -> ir.Value:
    """A new initializer whose name is ``name`` or derived from it."""
    name = unique_name(graph, name)
    if isinstance(tensor, np.ndarray | np.generic):
        tensor = ir.Tensor(np.asarray(tensor), name=name)
    tensor.name = name
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )
    graph.initializers.add(value)
    return value


@overload
def insert(
    graph: ir.Graph,
    anchor: ir.Node | None,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = ...,
    *,
    domain: str = ...,
    name: str | None = ...,
    dtype: ir.DataType | Sequence[ir.DataType | None] | None = ...,
    shape: Any = ...,
) -> ir.Value: ...


@overload
def insert(
    graph: ir.Graph,
    anchor: ir.Node | None,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = ...,
    *,
    domain: str = ...,
    name: str | None = ...,
    outputs: int,
    dtype: ir.DataType | Sequence[ir.DataType | None] | None = ...,
    shape: Any = ...,
) -> Any: ...


def insert(
    graph: ir.Graph,
    anchor: ir.Node | None,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    domain: str = "",
    name: str | None = None,
    outputs: int = 1,
    dtype: ir.DataType | Sequence[ir.DataType | None] | None = None,
    shape: Any = None,
) -> ir.Value | tuple[ir.Value, ...]:
    """Insert a new node right before ``anchor`` (None: at the end of the graph).

    Args:
        graph: Where ``anchor`` is.
        anchor: The node being rewritten; its inputs are available to the new node and its users
            come later, so the graph stays sorted.
        op_type: The operator.
        inputs: None for an optional input left out.
        domain: Of the operator.
        attributes: Python objects or ``ir.Attr``.
        name: Base of the names of the node and its outputs; made unique.
        outputs: How many.
        dtype: Element type of the output, or one per output.
        shape: Shape of the output (ints, names, None), or with ``outputs > 1`` one per output.

    Returns:
        The output, or with ``outputs > 1`` a tuple of all of them.
    """
    base = name or (anchor.outputs[0].name if anchor is not None else None) or op_type.lower()
    dtypes = dtype if isinstance(dtype, Sequence) else (dtype,) * outputs
    shapes = shape if outputs > 1 and shape is not None else (shape,) * outputs
    values = tuple(
        ir.Value(
            name=unique_name(graph, base if outputs == 1 else f"{base}_{i}"),
            type=None if d is None else ir.TensorType(d),
            shape=s.copy() if isinstance(s, ir.Shape) else None if s is None else ir.Shape(s),
        )
        for i, (d, s) in enumerate(zip(dtypes, shapes, strict=True))
    )
    node = ir.node(
        op_type, inputs, attributes, domain=domain, outputs=values, name=f"{values[0].name}/node"
    )
    if anchor is None:
        graph.append(node)
    else:
        graph.insert_before(anchor, node)
    return values[0] if outputs == 1 else values


def replace_value(old: ir.Value, new: ir.Value, *, keep_name: bool = False) -> None:
    """Let every user of ``old`` read ``new``.

    Where ``old`` is a graph output, the output keeps its name, type and shape; if ``new`` cannot
    take that name (it is an input, a constant or an output itself) an Identity carries it.

    Args:
        old: Left without users.
        new: Available wherever ``old`` is used.
        keep_name: ``new`` also takes the name of an ``old`` that is not a graph output; right for a
            value just inserted in the place of ``old``.
    """
    if new.type is None:
        new.type = old.type
    if new.shape is None and old.shape is not None:
        new.shape = old.shape.copy()
    if not old.is_graph_output():
        old.replace_all_uses_with(new)
        if keep_name and _renamable(new):
            _take_name(old, new)
        return
    graph = old.graph
    if graph is None:
        msg = f"value '{old.name}' belongs to no graph"
        raise ValueError(msg)
    producer = new.producer()
    if not _renamable(new) or producer is None or producer.graph is not graph:
        for use in tuple(old.uses()):  # the Identity is the last node: it comes after all of them
            use.node.replace_input_with(use.idx, new)
        new = insert(graph, None, "Identity", (new,), dtype=old.dtype, shape=old.shape)
    new.type = old.type
    new.shape = None if old.shape is None else old.shape.copy()
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    _take_name(old, new)


def replace_output(old: ir.Value, new: ir.Value) -> None:
    """Let ``new`` be the graph output in the place of ``old``, which its other users keep.

    Args:
        old: A graph output; takes the name that ``new`` had.
        new: Computed in the same graph, and no output itself; takes the name of ``old``.
    """
    graph = old.graph
    if graph is None or not old.is_graph_output():
        msg = f"value '{old.name}' is no graph output"
        raise ValueError(msg)
    graph.outputs[list(graph.outputs).index(old)] = new
    _take_name(old, new)


def _renamable(value: ir.Value) -> bool:
    return not (value.is_graph_input() or value.is_initializer() or value.is_graph_output())


def _take_name(old: ir.Value, new: ir.Value) -> None:
    old.name, new.name = new.name, old.name


def inherit_name(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let a constant made from another have its name, if nobody needs the other any more."""
    if old.name is None or not new.is_initializer() or new.is_graph_output():
        return
    producer = old.producer()
    if producer is not None and producer.graph is not None:  # a Constant that is an output
        return
    fixed = old.uses() or old.is_graph_output() or old.is_graph_input()
    if graph.initializers.get(old.name) is old and not fixed:
        del graph.initializers[old.name]
    if old.name not in graph.initializers:
        new.name = old.name


def carry_notes(old: ir.Node, new: ir.Value) -> None:
    """Give what passes noted in the metadata of ``old`` to the node that computes ``new``."""
    node = new.producer()
    if node is not None:
        notes = {k: v for k, v in old.metadata_props.items() if k.startswith("optimize.")}
        node.metadata_props.update(notes)


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads ``value`` (once), None if there are more or it is a graph output."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    return next(iter(uses)).node


def remove_dead(where: ir.Graph | ir.Model) -> int:
    """Remove nodes nobody reads and initializers nobody uses; returns how many of both."""
    graph = where.graph if isinstance(where, ir.Model) else where
    count = _remove_dead_nodes(graph)
    for name, value in list(graph.initializers.items()):
        unused = not value.uses() and not value.is_graph_output() and not value.is_graph_input()
        if unused:
            del graph.initializers[name]
            count += 1
    return count


def _remove_dead_nodes(graph: ir.Graph) -> int:
    count = 0
    for node in reversed(graph):
        if any(output.uses() or output.is_graph_output() for output in node.outputs):
            for subgraph in attribute_graphs(node):
                count += remove_dead(subgraph)
            continue
        for subgraph in attribute_graphs(node):  # what it reads from outside is no longer used
            for inner in subgraph.all_nodes():
                for index in range(len(inner.inputs)):
                    inner.replace_input_with(index, None)
        graph.remove(node, safe=True)
        count += 1
    return count


def attribute_graphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs a node holds as attributes (branches of If, bodies of Loop and Scan)."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def size_bytes(model: ir.Model) -> int:
    """Bytes of all initializers of the model and its subgraphs."""
    return sum(
        tensor.nbytes
        for graph in (model.graph, *model.graph.subgraphs())
        for tensor in _tensors(graph.initializers.values())
    )


def _tensors(values: Iterable[ir.Value]) -> Iterator[ir.TensorProtocol]:
    return (value.const_value for value in values if value.const_value is not None)
