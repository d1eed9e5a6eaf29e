"""Protobuf skeletons: the graph as protobuf without the bytes of its large tensors.

A whole model never goes through protobuf (its limit is 2 GB, and a copy of the weights would
double the memory); what runtimes and the ONNX checker need is the graph, with large initializers
as references to tensors that stay where they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

#: Placeholder in ``TensorProto.external_data``; it is never opened.
MEMORY_LOCATION = "memory"

#: Initializers up to this many bytes stay in the protobuf: shape and type inference reads
#: constants such as axes and target shapes, which are small.
INLINE_BYTES = 1024


@dataclass(frozen=True)
class Part:
    """Some nodes of a main graph, to be run by themselves.

    Attributes:
        nodes: Sorted.
        inputs: What they read from outside, as (name, element type, number of axes).
        outputs: Names of the values to return.
    """

    nodes: Sequence[ir.Node]
    inputs: Sequence[tuple[str, ir.DataType, int]]
    outputs: Sequence[str]


def skeleton(
    model: ir.Model,
    *,
    outputs: Sequence[ir.Value] | None = None,
    part: Part | None = None,
    keep: Collection[ir.DataType] = (),
    inline_bytes: int = INLINE_BYTES,
) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """Serialize ``model`` with its large initializers left out.

    Intermediate shapes (``value_info``) are not written: rewritten graphs may carry stale ones,
    and every reader of the skeleton infers its own.

    Args:
        model: Not changed.
        outputs: Graph outputs to write instead of the model's own; any value of the main graph.
        part: Write only these nodes, and what they read.
        keep: Element types that stay inline whatever their size.
        inline_bytes: Larger initializers are left out.

    Returns:
        The protobuf, and the tensors left out by initializer name. In the protobuf those have
        external data at ``MEMORY_LOCATION``.
    """
    proto = onnx.ModelProto(ir_version=model.ir_version, producer_name=model.producer_name or "")
    for domain in sorted(model.opset_imports):
        proto.opset_import.add(domain=domain, version=model.opset_imports[domain])
    graph = model.graph
    proto.graph.name = graph.name or "main_graph"
    if part is None:
        _write_interface(proto.graph, graph, graph.outputs if outputs is None else outputs)
    else:
        _write_part(proto.graph, part)
    read = None if part is None else names_read(part.nodes)
    large: dict[str, ir.TensorProtocol] = {}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None or (read is not None and name not in read):
            continue
        if not (value.uses() or value.is_graph_input() or value.is_graph_output()):
            continue  # runtimes drop it, and miss it when its numbers arrive
        if tensor.nbytes <= inline_bytes or tensor.dtype in keep:
            _write_inline(proto.graph.initializer.add(), name, tensor)
        else:
            _write_reference(proto.graph.initializer.add(), name, tensor)
            large[name] = tensor
    nodes = graph if part is None else part.nodes
    for node in nodes:
        ir.serde.serialize_node_into(
            proto.graph.node.add(), from_=node, model_ir_version=model.ir_version
        )
    _write_widths(proto.graph, nodes)
    for function in model.functions.values():
        ir.serde.serialize_function_into(
            proto.functions.add(), from_=function, model_ir_version=model.ir_version
        )
    return proto, large


def _write_widths(proto: onnx.GraphProto, nodes: Iterable[ir.Node]) -> None:
    """Declare the last axis of computed values of Attention.

    Shape inference of Attention-23 takes a width of V that it does not know for 0 (onnx 1.23, ONNX
    Runtime 1.32), and refuses what reads the result.
    """
    attentions = (n for n in nodes if n.op_type == "Attention" and len(n.inputs) > 2)
    for value in dict.fromkeys(node.inputs[2] for node in attentions):
        if value is None or value.producer() is None or value.is_graph_output():
            continue
        if value.dtype is None or not value.shape or not isinstance(value.shape[-1], int):
            continue
        kind = proto.value_info.add(name=value.name).type.tensor_type
        kind.elem_type = value.dtype.value
        for _ in value.shape[:-1]:
            kind.shape.dim.add()
        kind.shape.dim.add(dim_value=value.shape[-1])


def _write_interface(proto: onnx.GraphProto, graph: ir.Graph, outputs: Sequence[ir.Value]) -> None:
    own = {id(value) for value in graph.outputs}
    for value in graph.inputs:
        ir.serde.serialize_value_into(proto.input.add(), value)
    for value in outputs:
        if id(value) in own:
            ir.serde.serialize_value_into(proto.output.add(), value)
        else:
            proto.output.add(name=value.name)


def _write_part(proto: onnx.GraphProto, part: Part) -> None:
    for name, dtype, rank in part.inputs:
        tensor_type = proto.input.add(name=name).type.tensor_type
        tensor_type.elem_type = dtype.value
        tensor_type.shape.SetInParent()
        for axis in range(rank):
            tensor_type.shape.dim.add(dim_param=f"{name}.{axis}")
    for name in part.outputs:
        proto.output.add(name=name)


def names_read(nodes: Sequence[ir.Node]) -> set[str]:
    """Names that nodes read, in subgraphs too."""
    names: set[str] = set()
    for node in nodes:
        names.update(str(v.name) for v in node.inputs if v is not None)
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                graphs = [attribute.as_graph()]
            elif attribute.type == ir.AttributeType.GRAPHS:
                graphs = list(attribute.as_graphs())
            else:
                continue
            for graph in graphs:
                names.update(str(v.name) for v in graph.outputs)
                names |= names_read(list(graph))
    return names


def _write_inline(proto: onnx.TensorProto, name: str, tensor: ir.TensorProtocol) -> None:
    if isinstance(tensor, ir.ExternalTensor):
        proto.data_type = tensor.dtype.value
        proto.dims.extend(tensor.shape.numpy())
        proto.raw_data = tensor.tobytes()
    else:
        ir.serde.serialize_tensor_into(proto, tensor)
    proto.name = name


def _write_reference(proto: onnx.TensorProto, name: str, tensor: ir.TensorProtocol) -> None:
    proto.name = name
    proto.data_type = tensor.dtype.value
    proto.dims.extend(tensor.shape.numpy())
    proto.data_location = onnx.TensorProto.EXTERNAL
    proto.external_data.add(key="location", value=MEMORY_LOCATION)
