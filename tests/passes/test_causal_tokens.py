"""Causal towers, such as CLIP's of text: order is kept, and the end of the text is protected."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import token_reference as reference

from optimizer.conformance.encoders import Encoder, build_encoder, encoder_feed
from optimizer.legalize import legalize
from optimizer.pass_base import Context, Report
from optimizer.runners.ort import OrtRunner
from passes import get_pass

ENCODER = Encoder(patches=12, special=0, head="hidden")
REMOVED = (3, 2, 2)
ENDS = (8, 5, 11)
NAMES = [n for i in range(3) for n in (f"layers.{i}.norm2.out", f"stream.{i + 1}")]


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


def apply(model: ir.Model, name: str = "crossget", **options: Any) -> Report:
    pass_class = get_pass(name)
    report = pass_class(pass_class.Options(**options)).call(model, Context())
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return report


def exposed(model: ir.Model) -> ir.Model:
    for value in [v for n in model.graph for v in n.outputs if v.name in NAMES]:
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), None
        model.graph.outputs.append(value)
    return model


@pytest.mark.parametrize("lowering", ["gather", "matrix"])
@pytest.mark.parametrize("guidance", ["auto", "none"])
@pytest.mark.parametrize("ensemble", [False, True])
def test_layers_equal_the_reference_in_float64(
    lowering: str, guidance: str, *, ensemble: bool
) -> None:
    """The token at the end of each row is never merged, nothing goes into it, and it guides."""
    model = build()
    options = {"guidance": guidance, "ensemble": ensemble, "lowering": lowering}
    report = apply(model, r=REMOVED, places=True, **options)
    assert report.applied == 3
    assert report.details["towers"][0]["removed"] == list(REMOVED)
    feed = feed_of(model)
    found = OrtRunner(exposed(model)).run(feed)
    guide = 0 if guidance == "auto" else None
    weighed = ensemble and guide is not None
    method = reference.crossget(guide, ensemble=weighed)
    expected = reference.run_encoder(
        ENCODER, feed, REMOVED, (), method, causal=True, taken=ENDS
    )  # fmt: skip
    for name in (*NAMES, "logits"):
        assert found[name].shape == expected[name].shape
        # float32 against float64
        assert np.abs(found[name] - expected[name]).max() <= 1e-5 * np.abs(expected[name]).max()
    assert np.array_equal(found["token_places"], expected["places"])


def test_what_runs_fastest_computes_the_same() -> None:
    model = build(padding=True)
    apply(model, r=2)
    feed = feed_of(model)
    before = OrtRunner(model).run(feed)["logits"]
    legalize(model, "ort-cpu")
    after = OrtRunner(model).run(feed)["logits"]
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


def test_padding_has_no_effect() -> None:
    model = build(padding=True)
    assert apply(model, r=1).applied == 3
    feed = feed_of(model)
    before = OrtRunner(model).run(feed)["logits"]
    feed["patches"][feed["attention_mask"] == 0] = 7.0
    after = OrtRunner(model).run(feed)["logits"]
    assert np.abs(after - before).max() <= 1e-4 * np.abs(before).max()


def test_one_token_less_can_go_than_without_an_end() -> None:
    assert apply(build(), r=9).details["towers"][0]["removed"] == [5, 3, 1]


@pytest.mark.parametrize("name", ["tome", "prune-tokens"])
def test_methods_that_change_the_order_are_refused(name: str) -> None:
    report = apply(build(), name, r=2)
    assert not report.modified
    assert "causal, and merging changes the order" in report.skipped[0].reason


def test_other_masks_are_refused() -> None:
    report = apply(build(future=False), r=2)
    assert not report.modified
    assert "hides more than padding and what comes later" in report.skipped[0].reason
