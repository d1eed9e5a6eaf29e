"""Whether the functions of a model can be written out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import onnx
import onnx_ir as ir

from optimizer.errors import ModelError, UnsupportedError

#: A model whose functions are more nodes than this when written out is not one to optimize.
MAX_NODES = 1_000_000


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes of all graphs and functions."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def required_inputs(node: ir.Node, opset: int) -> list[tuple[int, str]]:
    """Position and name of the inputs that a standard operator cannot do without."""
    if not onnx.defs.has(node.op_type, opset, node.domain):
        return []
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    return [(n, f.name) for n, f in enumerate(schema.inputs) if f.option == single]


def check_functions(model: ir.Model) -> None:
    """Functions of the model are called with what they take, and end when written out.

    Raises:
        ModelError: A function that is its own part, or a call that does not fit it.
        UnsupportedError: Written out, the functions would be more than ``MAX_NODES`` nodes.
    """
    sizes = _sizes(model)
    types = {name: _attribute_types(function) for name, function in model.functions.items()}
    needed: dict[ir.OperatorIdentifier, frozenset[int]] = {}
    for name in sizes:  # what a function calls stands before it
        needed[name] = _needed(model.functions[name], needed)
    for node in all_nodes(model):
        function = model.functions.get(node.op_identifier())
        if function is not None:
            _check_call(node, function, types[node.op_identifier()], needed[node.op_identifier()])
    count = sum(sizes.get(node.op_identifier(), 0) for node in model.graph.all_nodes())
    if count > MAX_NODES:
        msg = f"its functions would be {count:.3g} nodes when written out, at most {MAX_NODES}"
        raise UnsupportedError(msg)


def _sizes(model: ir.Model) -> dict[ir.OperatorIdentifier, int]:
    """How many nodes each function is when written out."""
    sizes: dict[ir.OperatorIdentifier, int] = {}
    for root in model.functions:
        stack, path = [(root, False)], dict.fromkeys([root])
        while stack:
            name, done = stack.pop()
            calls = [n.op_identifier() for n in model.functions[name].all_nodes()]
            inner = [call for call in calls if call in model.functions]
            if done:
                sizes[name] = len(calls) + sum(sizes[call] for call in inner)
                path.pop(name, None)
                continue
            if name in sizes:
                continue
            path[name] = None
            stack.append((name, True))
            for call in inner:
                if call in path:
                    msg = f"function '{name[1]}' of domain '{name[0]}' calls itself"
                    raise ModelError(msg)
                stack.append((call, False))
    return sizes


def _needed(
    function: ir.Function, inner: Mapping[ir.OperatorIdentifier, Collection[int]]
) -> frozenset[int]:
    """The inputs that nodes of a function, or what it gives, cannot do without."""
    read = {value for value in function.outputs if value is not None}
    for node in function.all_nodes():
        positions = inner.get(node.op_identifier())
        if positions is None:
            opset = function.opset_imports.get(node.domain, 1)
            positions = [index for index, _ in required_inputs(node, opset)]
        read.update(v for n in positions for v in node.inputs[n : n + 1] if v is not None)
    return frozenset(n for n, value in enumerate(function.inputs) if value in read)


def _attribute_types(function: ir.Function) -> dict[str, ir.AttributeType]:
    """The type that the nodes of a function expect of each of its attributes."""
    found: dict[str, ir.AttributeType] = {}
    for node in function.all_nodes():
        for attribute in node.attributes.values():
            if attribute.ref_attr_name:
                found.setdefault(attribute.ref_attr_name, attribute.type)
    return found


def _check_call(
    node: ir.Node,
    function: ir.Function,
    types: Mapping[str, ir.AttributeType],
    needed: Collection[int],
) -> None:
    what = f"function '{node.op_type}' of domain '{node.domain}'"
    if len(node.inputs) > len(function.inputs) or len(node.outputs) > len(function.outputs):
        msg = f"node '{node.name}' gives or takes more than {what} has"
        raise ModelError(msg)
    for index in sorted(needed):
        if index >= len(node.inputs) or node.inputs[index] is None:
            msg = f"node '{node.name}' lacks input {index} of {what}, which it needs"
            raise ModelError(msg)
    for name, attribute in node.attributes.items():
        expected = types.get(name, attribute.type)
        if attribute.type != expected:
            msg = (
                f"node '{node.name}' gives {what} the attribute '{name}' as "
                f"{attribute.type.name}, expected {expected.name}"
            )
            raise ModelError(msg)
