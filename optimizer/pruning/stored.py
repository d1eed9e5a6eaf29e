"""Pruned weights between the decision and the file: one bit per weight, and what has changed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.data_files import note_source
from optimizer.half_weights import Widened
from optimizer.pruning.layers import Layer
from optimizer.pruning.methods import zeroed


@dataclass(frozen=True)
class PrunedWeight:
    """New weights [K, N] of one layer, compressed.

    Attributes:
        name: Of the weight.
        shape: K and N.
        bits: One per weight, set where it is kept.
        values: Those kept, in the order of the matrix; None = as they were.
    """

    name: str
    shape: tuple[int, int]
    bits: np.ndarray
    values: np.ndarray | None

    @classmethod
    def of(cls, name: str, new: np.ndarray, *, changed: bool) -> PrunedWeight:
        """Compress ``new``, in which other weights than the zeros differ from before or not."""
        kept = new != 0
        rows, columns = new.shape
        return cls(name, (rows, columns), np.packbits(kept), new[kept] if changed else None)

    @property
    def zeros(self) -> int:
        """Number of exact zeros."""
        rows, columns = self.shape
        return rows * columns - int(np.bitwise_count(self.bits).sum())

    def kept(self) -> np.ndarray:
        """[K, N] bool."""
        rows, columns = self.shape
        bits = np.unpackbits(self.bits, count=rows * columns)
        return bits.reshape(self.shape).astype(bool)

    def put(self, graph: ir.Graph, layer: Layer) -> None:
        """Let ``layer`` of ``graph``, or of its clone, read the new weight, under the old name.

        The tensor is expanded each time it is read, from the old one where only zeros are new.
        """
        old = layer.linear.weight
        tensor = graphs.constant(old)
        assert tensor is not None  # noqa: S101 - a layer's weight is a constant
        new = graphs.add_initializer(graph, str(old.name), self._in_place_of(tensor))
        layer.linear.matmul.replace_input_with(1, new)
        graphs.inherit_name(graph, old, new)

    def _in_place_of(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """The new weight, stored as the old one is."""
        if isinstance(tensor, Widened):
            stored = self._in_place_of(tensor.stored)
            wide = graphs.lazy(
                self.name, tensor.dtype, self.shape, lambda: stored.numpy().astype(np.float32)
            )
            return Widened(stored, wide)
        made = graphs.lazy(self.name, tensor.dtype, self.shape, lambda: self._numbers(tensor))
        note_source(made, tensor)
        return made

    def _numbers(self, before: ir.TensorProtocol) -> np.ndarray:
        if self.values is None:
            result = zeroed(before.numpy(), ~self.kept())
            graphs.release(before)
            return result
        result = np.zeros(self.shape, before.dtype.numpy())
        result[self.kept()] = self.values
        return result
