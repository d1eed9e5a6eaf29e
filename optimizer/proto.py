"""Protobuf skeletons: the graph as protobuf without the bytes of its large tensors.

A whole model never goes through protobuf (its limit is 2 GB, and a copy of the weights would
double the memory); what runtimes and the ONNX checker need is the graph, with large initializers
as references to tensors that stay where they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx
import onnx_ir as ir

#: Placeholder in ``TensorProto.external_data``; it is never opened.
MEMORY_LOCATION = "memory"

#: Initializers up to this many bytes stay in the protobuf: shape and type inference reads
#: constants such as axes and target shapes, which are small.
INLINE_BYTES = 1024


def skeleton(
    model: ir.Model,
    *,
    outputs: Sequence[ir.Value] | None = None,
    keep: Collection[ir.DataType] = (),
    inline_bytes: int = INLINE_BYTES,
) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """Serialize ``model`` with its large initializers left out.

    Intermediate shapes (``value_info``) are not written: rewritten graphs may carry stale ones,
    and every reader of the skeleton infers its own.

    Args:
        model: Not changed.
        outputs: Graph outputs to write instead of the model's own; any value of the main graph.
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
    for value in graph.inputs:
        ir.serde.serialize_value_into(proto.graph.input.add(), value)
    own = {id(value) for value in graph.outputs}
    for value in graph.outputs if outputs is None else outputs:
        if id(value) in own:
            ir.serde.serialize_value_into(proto.graph.output.add(), value)
        else:
            proto.graph.output.add(name=value.name)
    large: dict[str, ir.TensorProtocol] = {}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        if tensor.nbytes <= inline_bytes or tensor.dtype in keep:
            _write_inline(proto.graph.initializer.add(), name, tensor)
        else:
            _write_reference(proto.graph.initializer.add(), name, tensor)
            large[name] = tensor
    for node in graph:
        ir.serde.serialize_node_into(
            proto.graph.node.add(), from_=node, model_ir_version=model.ir_version
        )
    for function in model.functions.values():
        ir.serde.serialize_function_into(
            proto.functions.add(), from_=function, model_ir_version=model.ir_version
        )
    return proto, large


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
