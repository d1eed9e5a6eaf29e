"""Sparse initializers become dense ones when a model is read: no rule has to know them.

A sparse tensor of shape [d1, .., dn] holds its numbers, and their places either as flat indices
[NNZ] or as coordinates [NNZ, n].
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from optimizer.errors import ModelError, UnsupportedError

#: A dense tensor may always have this many bytes, and more where the sparse one is not tiny.
_FREE = 1 << 24
_GROWTH = 256


def write_dense(proto: onnx.ModelProto) -> None:
    """Replace every sparse initializer and sparse Constant of a model.

    Raises:
        ModelError: Numbers and places do not fit each other.
        UnsupportedError: The dense tensor would be out of all proportion.
    """
    for graph in _graphs(proto.graph):
        for sparse in graph.sparse_initializer:
            graph.initializer.append(_dense(sparse))
        graph.ClearField("sparse_initializer")
    for node in _nodes(proto):
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.SPARSE_TENSOR and node.op_type == "Constant":
                tensor = _dense(attribute.sparse_tensor)
                attribute.Clear()
                attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
                attribute.t.CopyFrom(tensor)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    yield from _inner_graphs(graph.node)


def _inner_graphs(nodes: object) -> Iterator[onnx.GraphProto]:
    for node in nodes:  # type: ignore[attr-defined]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for graph in attribute.graphs:
                yield from _graphs(graph)


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in _graphs(proto.graph):
        yield from graph.node
    for function in proto.functions:
        yield from function.node
        for graph in _inner_graphs(function.node):
            yield from graph.node


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    values, places, dims = sparse.values, sparse.indices, tuple(sparse.dims)
    name = values.name
    if any(t.data_location == onnx.TensorProto.EXTERNAL for t in (values, places)):
        msg = f"sparse initializer '{name}' is external data; expected its numbers in the file"
        raise UnsupportedError(msg)
    try:
        numbers, index = numpy_helper.to_array(values), numpy_helper.to_array(places)
    except (ValueError, TypeError, KeyError) as error:
        msg = f"sparse initializer '{name}' holds other numbers than its type and shape say"
        raise ModelError(msg) from error
    size = math.prod(dims)
    wanted = (numbers.size,) if index.ndim == 1 else (numbers.size, len(dims))
    if min(dims, default=1) < 0 or numbers.ndim != 1 or index.shape != wanted:
        msg = f"sparse initializer '{name}' of shape {list(dims)} has numbers without a place"
        raise ModelError(msg)
    if size * numbers.itemsize > max(_FREE, _GROWTH * sparse.ByteSize()):
        msg = (
            f"sparse initializer '{name}' {list(dims)} would be {size * numbers.itemsize} bytes in "
            f"dense form, of {sparse.ByteSize()} stored"
        )
        raise UnsupportedError(msg)
    flat = _flat(index.astype(np.int64), dims)
    if flat.size and not (flat.min() >= 0 and flat.max() < size):
        msg = f"sparse initializer '{name}' of shape {list(dims)} has a number outside of it"
        raise ModelError(msg)
    array = np.zeros(size, numbers.dtype)
    array[flat] = numbers
    result: onnx.TensorProto = numpy_helper.from_array(array.reshape(dims), name)
    return result


def _flat(index: np.ndarray, dims: tuple[int, ...]) -> np.ndarray:
    """Flat indices; out of bounds where a coordinate is."""
    if index.ndim == 1:
        return index
    inside = ((index >= 0) & (index < np.array(dims, np.int64))).all(axis=1)
    strides = np.array([math.prod(dims[axis + 1 :]) for axis in range(len(dims))], np.int64)
    flat: np.ndarray = np.where(inside, index @ strides, -1)
    return flat
