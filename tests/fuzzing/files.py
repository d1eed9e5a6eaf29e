"""A model and what lies beside it, as a fuzzer writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
from fuzzing.mutations import messages

FLOAT, INT64, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL

#: Stands for the folder beside the model's that must not be touched.
OUTSIDE = "{outside}"


@dataclass(frozen=True)
class Special:
    """A file that is not a plain one.

    Attributes:
        kind: "symlink", "hardlink", "fifo", "folder" or "sparse".
        target: Of a link.
        size: Of a sparse file.
    """

    kind: str
    target: str = ""
    size: int = 0


@dataclass(frozen=True)
class Hostile:
    """One folder with a model in it.

    Attributes:
        name: Of what is tried.
        model: The ``.onnx`` file.
        files: What lies beside it.
    """

    name: str
    model: bytes
    files: Mapping[str, bytes | Special] = field(default_factory=dict)


def aimed(model: bytes, outside: str) -> bytes:
    """The model with the real folder for ``OUTSIDE``."""
    if OUTSIDE.encode() not in model:
        return model
    proto = onnx.ModelProto.FromString(model)
    for message in messages(proto):
        if isinstance(message, onnx.StringStringEntryProto):
            message.value = message.value.replace(OUTSIDE, outside)
    content: bytes = proto.SerializeToString()
    return content


def holding(tensor: onnx.TensorProto, place: str) -> bytes:
    """A model x [4] -> y [4] that holds a tensor in one of its places."""
    value = oh.make_tensor_value_info
    nodes, held, sparse, functions = [], [], [], []
    opsets = [oh.make_opsetid("", 18)]
    if place == "initializer":
        held = [tensor]
        nodes = [oh.make_node("Add", ["x", "w"], ["y"])]
    elif place == "unused":
        held = [tensor]
        nodes = [oh.make_node("Relu", ["x"], ["y"])]
    elif place == "attribute":
        nodes = [constant_of(tensor), oh.make_node("Add", ["x", "w"], ["y"])]
    elif place == "branch":
        add = oh.make_node("Add", ["x", "w"], ["z"])
        graph = oh.make_graph([add], "t", [], [value("z", FLOAT, [4])], [tensor])
        held = [onh.from_array(np.array(True), "p")]
        nodes = [oh.make_node("If", ["p"], ["y"], then_branch=graph, else_branch=graph)]
    elif place == "function":
        body = [constant_of(tensor), oh.make_node("Add", ["v", "w"], ["r"])]
        functions = [oh.make_function("own", "f", ["v"], ["r"], body, opsets)]
        nodes = [oh.make_node("f", ["x"], ["y"], domain="own")]
        opsets = [*opsets, oh.make_opsetid("own", 1)]
    elif place == "list":
        node = oh.make_node("Relu", ["x"], ["y"])
        node.attribute.append(onnx.AttributeProto(name="many", type="TENSORS", tensors=[tensor]))
        nodes = [node]
    else:
        index = onh.from_array(np.arange(4, dtype=np.int64), "w_i")
        sparse = [oh.make_sparse_tensor(tensor, index, [4])]
        nodes = [oh.make_node("Add", ["x", "w"], ["y"])]
    graph = oh.make_graph(
        nodes,
        "g",
        [value("x", FLOAT, [4])],
        [value("y", FLOAT, [4])],
        held,
        sparse_initializer=sparse,
    )
    model = oh.make_model(graph, opset_imports=opsets, functions=functions, ir_version=9)
    content: bytes = model.SerializeToString()
    return content


def constant_of(tensor: onnx.TensorProto) -> onnx.NodeProto:
    attribute = onnx.AttributeProto(name="value", type="TENSOR", t=tensor)
    return onnx.NodeProto(op_type="Constant", output=["w"], attribute=[attribute])


def model_of(
    nodes: list[onnx.NodeProto],
    held: Mapping[str, np.ndarray] | None = None,
    *,
    dims: list[int | str],
    kind: int = FLOAT,
    functions: list[onnx.FunctionProto] | None = None,
) -> bytes:
    """A model x [N] -> y."""
    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info("x", FLOAT, ["N"])],
        [oh.make_tensor_value_info("y", kind, dims)],
        [onh.from_array(np.asarray(array), name) for name, array in (held or {}).items()],
    )
    opsets = [oh.make_opsetid("", 20), oh.make_opsetid("own", 1)]
    model = oh.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions or [])
    content: bytes = model.SerializeToString()
    return content
