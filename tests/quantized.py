"""Canonical symmetric int8 Q/DQ written into a canonical float model, by the plainest rules."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs


def quantize(
    model: ir.Model,
    *,
    scale: float = 0.05,
    per_token: tuple[str, ...] = (),
    centred: bool = False,
) -> int:
    """Quantize every MatMul with a constant weight, in place.

    Activations share one pair per value. Linears whose weight's name contains a word of
    ``per_token`` divide their input by its largest magnitude first and multiply back after;
    ``centred``: then they cover 0 to 1 instead of -1 to 1, which suits inputs that are positive.
    """
    graph = model.graph
    zero = graphs.add_initializer(graph, "s8_zero", np.array(0, np.int8))
    shared: dict[str, ir.Value] = {}
    count = 0
    for node in [n for n in graph if n.op_type == "MatMul" and graphs.constant(n.inputs[1])]:
        x, weight = node.inputs
        rowwise = any(word in weight.name for word in per_token)
        step = 1 / 127 if rowwise else scale
        top = None
        if rowwise:
            axes = graphs.add_initializer(graph, "last", np.array([-1], np.int64))
            floor = graphs.add_initializer(graph, "floor", np.array(1e-5, np.float32))
            top = graphs.insert(graph, node, "Abs", (x,))
            top = graphs.insert(graph, node, "ReduceMax", (top, axes), {"keepdims": 1})
            top = graphs.insert(graph, node, "Max", (top, floor))
            x = graphs.insert(graph, node, "Div", (x, top))
            if centred:
                half = graphs.add_initializer(graph, "half", np.array(0.5, np.float32))
                x, step = graphs.insert(graph, node, "Sub", (x, half)), 0.5 / 127
        if x.name not in shared:
            s = graphs.add_initializer(graph, f"{x.name}_scale", np.array(step, np.float32))
            q = graphs.insert(graph, node, "QuantizeLinear", (x, s, zero), dtype=ir.DataType.INT8)
            shared[x.name] = graphs.insert(
                graph, node, "DequantizeLinear", (q, s, zero), dtype=ir.DataType.FLOAT
            )
        w = graphs.const(weight)
        ws = (np.abs(w).max(axis=0) / 127 + 1e-12).astype(np.float32)
        codes = np.clip(np.rint(w / ws), -127, 127).astype(np.int8)
        w8 = graphs.add_initializer(graph, f"{weight.name}_int8", codes)
        w_scale = graphs.add_initializer(graph, f"{weight.name}_scale", ws)
        wide = graphs.insert(
            graph, node, "DequantizeLinear", (w8, w_scale), {"axis": 1}, dtype=ir.DataType.FLOAT
        )
        new = graphs.insert(graph, node, "MatMul", (shared[x.name], wide), dtype=ir.DataType.FLOAT)
        if rowwise and centred:
            lost = (0.5 * (codes * ws).sum(axis=0)).astype(np.float32)
            bias = graphs.add_initializer(graph, f"{weight.name}_lost", lost)
            new = graphs.insert(graph, node, "Add", (new, bias), dtype=ir.DataType.FLOAT)
        if top is not None:
            new = graphs.insert(graph, node, "Mul", (new, top), dtype=ir.DataType.FLOAT)
        graphs.replace_value(node.outputs[0], new, keep_name=True)
        count += 1
    graphs.remove_dead(model)
    return count
