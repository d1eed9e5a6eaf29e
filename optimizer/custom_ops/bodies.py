"""The bodies of ``SparseMatMul`` in a model: there while it is worked on, left out for TensorRT.

TensorRT's ONNX parser prefers a function of the model to a plugin of the same name. A file for it
therefore has the operator alone, and gets its bodies back when it is read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from optimizer.custom_ops.declaration import DOMAIN, OP_TYPE, VERSION, body, declaration_hash
from optimizer.errors import UnsupportedError


def operators(model: ir.Model) -> list[ir.Node]:
    """The nodes of the main graph that are the operator."""
    return [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)]


def add_body(model: ir.Model, node: ir.Node, *, decoded: bool = False) -> None:
    """Let a node of the operator call its body, and the model have it.

    Args:
        model: Has the node.
        node: Has the operator's attributes.
        decoded: Whether the weight itself comes in the place of the bitmap.

    Raises:
        ValueError: The operator has no such form.
    """
    layout, activation = (node.attributes.get_string(n, "") for n in ("layout", "activation"))
    opset = model.graph.opset_imports.get("", 23)
    function = body(layout, activation, len(node.inputs), opset, decoded=decoded)
    node.overload = function.overload
    model.functions.setdefault(function.identifier(), function)


def restore_bodies(model: ir.Model) -> None:
    """Add what is missing.

    Raises:
        UnsupportedError: Another version of this program declared the operator otherwise.
    """
    for node in operators(model):
        if node.op_identifier() in model.functions:
            continue
        declared = node.attributes.get_int("declaration", 0)
        if declared != declaration_hash():
            raise UnsupportedError(
                f"node '{node.name}' was written for declaration {declared} of {DOMAIN}.{OP_TYPE}, "
                f"expected {declaration_hash()}; make the file again from its source with this "
                "version, or use the version that made it"
            )
        with contextlib.suppress(ValueError):  # no such form: reported by who runs it
            add_body(model, node)


@contextlib.contextmanager
def left_out(model: ir.Model) -> Iterator[None]:
    """The model without bodies of the operator, until the end of the block."""
    bodies = {key: f for key, f in model.functions.items() if key[:2] == (DOMAIN, OP_TYPE)}
    names = [(node, node.overload) for node in operators(model)]
    for key in bodies:
        del model.functions[key]
    for node, _ in names:
        node.overload = ""
    try:
        yield
    finally:
        model.functions.update(bodies)
        for node, name in names:
            node.overload = name


def plugins_of(model: ir.Model) -> list[dict[str, Any]]:
    """What a program that runs the model has to load, for the manifest."""
    nodes = operators(model)
    if not nodes:
        return []
    layouts = sorted({node.attributes.get_string("layout", "") for node in nodes})
    return [
        {
            "operator": f"{DOMAIN}::{OP_TYPE}",
            "version": VERSION,
            "declaration": declaration_hash(),
            "layouts": layouts,
            "nodes": len(nodes),
        }
    ]
