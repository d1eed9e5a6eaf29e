"""Small canonical models for tests: transformers of every style, and a chain of products."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optimizer.conformance.decoders import Config, Writer, build, feed

__all__ = ["Config", "Writer", "build", "chain", "feed"]


def chain(count: int) -> ir.Model:
    """One product after the other: y = x * c0 * c1 * ..., nodes p0, p1, ..."""
    random = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 4]))
    w, y = Writer(), x
    for number in range(count):
        factors = random.uniform(0.9, 1.1, 4).astype(np.float32)
        y = w.op("Mul", [y, w.const(f"c{number}", factors)], f"y{number}")
        w.nodes[-1].name = f"p{number}"
    y.type, y.shape = x.type, x.shape
    held = list(w.initializers.values())
    graph = ir.Graph([x], [y], nodes=w.nodes, initializers=held, opset_imports={"": 23})
    return ir.Model(graph, ir_version=10)
