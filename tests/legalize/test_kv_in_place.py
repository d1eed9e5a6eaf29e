from __future__ import annotations

import json

import models
import numpy as np
import onnx_ir as ir
import pytest
import quantized

from optimizer import graph as graphs
from optimizer.errors import UnsupportedError
from optimizer.legalize import legalize
from optimizer.runners.decode import DecodeSession
from optimizer.runners.ort import OrtRunner

CASES = {
    "grouped-query": {},
    "multi-head": {"kv_heads": 4},
    "no rotary": {"rotary": False},
    "layer norm": {"norm": "layer", "gated": False, "activation": "gelu", "bias": True},
}


def _both(model: ir.Model) -> tuple[DecodeSession, DecodeSession]:
    in_place = model.clone()
    legalize(model, "ort-cpu")
    legalize(in_place, "ort-cpu", kv_cache="in-place")
    sessions = DecodeSession(model), DecodeSession(in_place, max_length=32)
    assert [session.form for session in sessions] == ["append", "in-place"]
    return sessions


def _close(one: np.ndarray, two: np.ndarray) -> bool:
    return bool(np.abs(one - two).max() <= 1e-5 * np.abs(one).max())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", ["float", "int8"])
def test_prefill_and_decode_agree_with_the_appended_cache(case, precision):
    model = models.build(models.Config(kv_cache=True, **CASES[case]))
    if precision == "int8":
        quantized.quantize(model, per_token=("down",))
    append, in_place = _both(model)
    rng = np.random.default_rng(3)
    prompt = rng.integers(0, 50, (2, 6))
    first, second = append.prefill(prompt), in_place.prefill(prompt)
    tolerance = _close if precision == "float" else _nearly
    assert tolerance(first, second)
    for token in rng.integers(0, 50, (8, 2)):
        assert tolerance(append.step(token), in_place.step(token))
    caches = append.cache(), in_place.cache()
    assert list(caches[0]) == list(caches[1])
    assert all(tolerance(caches[0][name], caches[1][name]) for name in caches[0])


def _nearly(one: np.ndarray, two: np.ndarray) -> bool:
    """Equal but for single codes: a number at the boundary of two codes may fall on either side."""
    return bool(np.linalg.norm(one - two) <= 2e-2 * np.linalg.norm(one))


@pytest.mark.parametrize("window", [0, 4])
def test_rows_padded_on_the_right_decode_as_if_they_were_alone(window):
    model = _windowed(window) if window else models.build(models.Config(kv_cache=True))
    legalize(model, "ort-cpu", kv_cache="in-place")
    session = DecodeSession(model, max_length=16)
    rng = np.random.default_rng(5)
    prompt, tokens = rng.integers(0, 50, (2, 6)), rng.integers(0, 50, (4, 2))
    session.prefill(prompt, np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]))
    together = [session.step(token) for token in tokens]
    for row, length in ((0, 3), (1, 6)):
        session.prefill(prompt[row : row + 1, :length])
        for token, expected in zip(tokens, together, strict=True):
            assert _close(expected[row : row + 1], session.step(token[row : row + 1]))


def test_nothing_is_copied_when_past_and_present_share_memory():
    model = models.build(models.Config(kv_cache=True))
    legalize(model, "ort-cpu", kv_cache="in-place")
    session = DecodeSession(model, max_length=16)
    session.prefill(np.arange(5)[None])
    addresses = [value.data_ptr() for value in session._cache.values()]
    before = {name: array.copy() for name, array in session.cache().items()}
    session.step(np.array([7]))
    assert [value.data_ptr() for value in session._cache.values()] == addresses
    for name, array in session.cache().items():
        np.testing.assert_array_equal(array[:, :, :5], before[name])
        assert array.shape[2] == 6
        assert array[:, :, 5].any()


def test_a_caller_that_feeds_the_cache_as_before_gets_the_same():
    config = models.Config(kv_cache=True)
    model = models.build(config)
    in_place = model.clone()
    legalize(in_place, "ort-cpu", kv_cache="in-place")
    one, two = OrtRunner(model), OrtRunner(in_place)
    for sequence, past in ((5, 0), (1, 4)):
        feed = models.feed(config, sequence=sequence, past=past)
        expected, found = one.run(feed), two.run(feed)
        assert list(expected) == list(found)
        assert all(_close(expected[name], found[name]) for name in expected)


def test_names_and_order_of_inputs_and_outputs_are_kept_and_the_form_is_declared():
    model = models.build(models.Config(kv_cache=True))
    names = [[v.name for v in values] for values in (model.graph.inputs, model.graph.outputs)]
    legalize(model, "ort-cpu", kv_cache="in-place")
    graph = model.graph
    assert names == [[v.name for v in values] for values in (graph.inputs, graph.outputs)]
    facts = json.loads(model.metadata_props["optimize.kv_cache"])
    assert facts["form"] == "in-place"
    assert facts["padding"] == "right"
    assert facts["buffers"]["past_key_values.1.value"] == "present.1.value"
    past = next(v for v in graph.inputs if v.name == "past_key_values.0.key")
    assert [str(d) for d in past.shape] == ["batch", "2", "max_length", "8"]


def _windowed(size: int, **changes) -> ir.Model:
    """A model that lets each token see ``size`` tokens, itself included."""
    model = models.build(models.Config(kv_cache=True, **changes))
    graph = model.graph
    causal = next(n for n in graph if n.op_type == "LessOrEqual")
    keys, queries = causal.inputs
    width = graphs.add_initializer(graph, "width", np.array(size, np.int64))
    oldest = graphs.insert(graph, causal, "Sub", (queries, width))
    near = graphs.insert(graph, causal, "Greater", (keys, oldest))
    mask = next(n for n in graph if n.op_type == "And")
    both = graphs.insert(graph, mask, "And", (causal.outputs[0], near))
    mask.replace_input_with(0, both)
    return model


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_sliding_window_is_found_and_kept(size):
    append, in_place = _both(_windowed(size))
    rng = np.random.default_rng(7)
    prompt = rng.integers(0, 50, (2, 6))
    assert _close(append.prefill(prompt), in_place.prefill(prompt))
    for token in rng.integers(0, 50, (5, 2)):
        assert _close(append.step(token), in_place.step(token))


def _strange(change: str) -> ir.Model:
    model = models.build(models.Config(kv_cache=change != "no cache", mask=change != "no mask"))
    graph = model.graph
    attention = [n for n in graph if n.op_type == "Attention"]
    mask = attention[0].inputs[3] if len(attention[0].inputs) > 3 else None
    causal = next((n for n in graph if n.op_type == "LessOrEqual"), None)
    if change == "bidirectional":
        causal.op_type = "GreaterOrEqual"
    elif change == "off by one":
        causal.op_type = "Less"
    elif change == "no padding":
        both = next(n for n in graph if n.op_type == "And")
        both.replace_input_with(1, both.inputs[0])
    elif change == "bias":
        scores = graphs.insert(graph, attention[0], "Cast", (mask,), {"to": 1})
        attention[0].replace_input_with(3, scores)
    elif change == "content":
        ids = graphs.insert(graph, attention[0], "Cast", (graph.inputs[0],), {"to": 9})
        axes = graphs.add_initializer(graph, "axes", np.array([1, 3], np.int64))
        rows = graphs.insert(graph, attention[0], "Unsqueeze", (ids, axes))
        attention[0].replace_input_with(3, graphs.insert(graph, attention[0], "And", (mask, rows)))
    elif change == "per head":
        heads = graphs.add_initializer(graph, "h", np.array([True, False] * 2).reshape(1, 4, 1, 1))
        attention[1].replace_input_with(3, graphs.insert(graph, attention[1], "And", (mask, heads)))
    elif change == "window with a hole":
        number = graphs.add_initializer(graph, "n", np.array(40, np.int64))
        keys, queries = causal.inputs
        gap = graphs.insert(graph, causal, "Sub", (queries, keys))
        other = graphs.insert(graph, causal, "Equal", (gap, number))
        allowed = graphs.insert(graph, attention[0], "Not", (other,))
        attention[0].replace_input_with(
            3, graphs.insert(graph, attention[0], "And", (mask, allowed))
        )
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("no cache", "it has no KV cache"),
        ("no mask", "no input 'attention_mask'"),
        ("bidirectional", "not causal"),
        ("off by one", "not causal"),
        ("no padding", "not causal with padding"),
        ("bias", "adds a bias"),
        ("content", "depends on the numbers in input 'input_ids'"),
        ("per head", "differs from head to head"),
        ("window with a hole", "not causal"),
    ],
)
def test_a_mask_that_is_not_proven_causal_is_refused_with_the_reason(change, reason):
    with pytest.raises(UnsupportedError, match=reason) as caught:
        legalize(_strange(change), "ort-cpu", kv_cache="in-place")
    assert "--kv-cache append" in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_float_mask_of_cuts_is_accepted():
    model = models.build(models.Config(kv_cache=True))
    graph = model.graph
    attention = [n for n in graph if n.op_type == "Attention"]
    zero = graphs.add_initializer(graph, "keep", np.array(0, np.float32))
    low = graphs.add_initializer(graph, "cut", np.array(np.finfo(np.float32).min))
    scores = graphs.insert(graph, attention[0], "Where", (attention[0].inputs[3], zero, low))
    for node in attention:
        node.replace_input_with(3, scores)
    append, in_place = _both(model)
    prompt = np.random.default_rng(1).integers(0, 50, (2, 6))
    assert _close(append.prefill(prompt), in_place.prefill(prompt))


def test_positions_counted_from_the_length_of_the_past_stay_right_with_longer_buffers():
    """Models without position_ids take positions from the shape of the past."""
    model = models.build(models.Config(kv_cache=True))
    graph = model.graph
    old = next(v for v in graph.inputs if v.name == "position_ids")
    first = next(iter(graph))
    zero, one = (graphs.add_initializer(graph, f"c{i}", np.array(i, np.int64)) for i in (0, 1))
    past = next(v for v in graph.inputs if v.name == "past_key_values.1.value")
    whole = graphs.insert(graph, first, "Shape", (past,))
    two = graphs.add_initializer(graph, "c2", np.array(2, np.int64))
    start = graphs.insert(graph, first, "Gather", (whole, two))
    ids = graphs.insert(graph, first, "Shape", (graph.inputs[0],), {"start": 1, "end": 2})
    ids = graphs.insert(graph, first, "Squeeze", (ids,))
    steps = graphs.insert(graph, first, "Range", (zero, ids, one))
    positions = graphs.insert(graph, first, "Add", (steps, start))
    axis = graphs.add_initializer(graph, "c_axis", np.array([0], np.int64))
    positions = graphs.insert(graph, first, "Unsqueeze", (positions, axis))
    shape = graphs.insert(graph, first, "Shape", (graph.inputs[0],))
    positions = graphs.insert(graph, first, "Expand", (positions, shape))
    old.replace_all_uses_with(positions)
    graph.inputs.remove(old)
    append, in_place = _both(model)
    rng = np.random.default_rng(9)
    prompt = rng.integers(0, 50, (2, 6))
    assert _close(append.prefill(prompt), in_place.prefill(prompt))
    for token in rng.integers(0, 50, (4, 2)):
        assert _close(append.step(token), in_place.step(token))


@pytest.mark.parametrize("target", ["ort-cuda", "tensorrt-11"])
def test_other_targets_have_no_cache_in_place(target):
    with pytest.raises(UnsupportedError, match="--kv-cache in-place does not exist"):
        legalize(models.build(kv_cache=True), target, kv_cache="in-place")
