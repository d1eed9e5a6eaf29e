"""Small causal encoders whose head reads the end of each text, as CLIP's of text does."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optimizer.conformance.encoders import Encoder, build_encoder, encoder_feed

ENCODER = Encoder(patches=12, special=0, head="hidden")
ENDS = (8, 5, 11)


def build(*, end: bool = True, padding: bool = False, future: bool = True) -> ir.Model:
    """A causal encoder whose head reads the token at ``end``; ``logits`` [batch, 5].

    ``future``: False for a mask by which each token sees itself and what comes after.
    """
    model = build_encoder(ENCODER)
    graph = model.graph
    constants = {
        "order": np.tri(12, dtype=bool) if future else np.tri(12, dtype=bool).T,
        "zero": np.array(0, np.int64), "one": np.array(1, np.int64),
        "last": np.array([-1], np.int64), "axes": np.array([1, 2], np.int64),
        "first": np.array([0], np.int64),
    }  # fmt: skip
    values = {}
    for name, array in constants.items():
        values[name] = ir.Value(
            name=f"c_{name}", const_value=ir.tensor(array, name=f"c_{name}"),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape),
        )  # fmt: skip
        graph.register_initializer(values[name])
    mask = values["order"]
    before = graph[0]
    if padding:
        valid = _input(graph, "attention_mask", ["batch", 12])
        nodes = [ir.node("Cast", [valid], {"to": ir.DataType.BOOL.value})]
        nodes.append(ir.node("Unsqueeze", [nodes[0].outputs[0], values["axes"]]))
        nodes.append(ir.node("And", [nodes[1].outputs[0], mask]))
        _named(nodes, "mask")
        graph.insert_before(before, nodes)
        mask = nodes[-1].outputs[0]
    for node in [n for n in graph if n.op_type == "Attention"]:
        node.resize_inputs(4)
        node.replace_input_with(3, mask)
    if end:
        _read_at_end(graph, values)
    else:
        graph.outputs.pop()
    return model


def _input(graph: ir.Graph, name: str, shape: list[int | str]) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(shape))
    graph.inputs.append(value)
    return value


def _named(nodes: list[ir.Node], base: str) -> None:
    for index, node in enumerate(nodes):
        node.name = node.outputs[0].name = f"{base}.{index}"


def _read_at_end(graph: ir.Graph, values: dict[str, ir.Value]) -> None:
    """Logits of the token at input ``end`` [batch], as exporters write it."""
    end, final = _input(graph, "end", ["batch"]), graph.outputs.pop()
    final.shape = None
    head = next(n for n in graph if n.outputs[0].name == "logits")
    nodes = [ir.node("Shape", [end], {"start": 0, "end": 1})]
    nodes.append(ir.node("Squeeze", [nodes[-1].outputs[0]]))
    nodes.append(ir.node("Range", [values["zero"], nodes[-1].outputs[0], values["one"]]))
    nodes.append(ir.node("Unsqueeze", [nodes[-1].outputs[0], values["last"]]))
    nodes.append(ir.node("Unsqueeze", [end, values["last"]]))
    pair = [nodes[-2].outputs[0], nodes[-1].outputs[0]]
    nodes.append(ir.node("Concat", pair, {"axis": -1}))
    nodes.append(ir.node("GatherND", [final, nodes[-1].outputs[0]], {"batch_dims": 0}))
    _named(nodes, "end_of_text")
    graph.insert_before(head, nodes)
    first = head.inputs[0].producer()
    head.replace_input_with(0, nodes[-1].outputs[0])
    graph.remove(first, safe=True)


def feed_of(model: ir.Model) -> dict[str, np.ndarray]:
    feed = encoder_feed(ENCODER, batch=3)
    valid = np.ones((3, 12), np.int64)
    for row, end in enumerate(ENDS):
        valid[row, end + 1 :] = 0
    feed |= {"end": np.array(ENDS, np.int64), "attention_mask": valid}
    return {v.name: feed[v.name] for v in model.graph.inputs}
