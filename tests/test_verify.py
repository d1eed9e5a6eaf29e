"""Exact passes are proven, wrong ones are caught, whatever the size of the model."""

from __future__ import annotations

import models
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import quantize
from rule_case import graph, ops

from optimizer import memory
from optimizer import verify as verify_module
from optimizer.calibration import input_specs
from optimizer.errors import ModelError, VerificationError
from optimizer.footprint import shared_cuts
from optimizer.graph import add_initializer
from optimizer.legalize import legalize
from optimizer.pass_base import Context, Exactness
from optimizer.probes import make_probes
from optimizer.proto import skeleton
from optimizer.runners.ort import OrtRunner
from optimizer.samples import load_samples
from optimizer.segments import segments
from optimizer.verify import verify
from passes.canonicalize import Canonicalize

STYLES = {
    "llama": {},
    "cache": {"kv_cache": True},
    "post-norm": {"style": "post-norm", "norm": "layer", "bias": True, "rotary": False},
    "parallel": {"style": "parallel", "gated": False, "activation": "gelu"},
    "no mask": {"mask": False},
}
#: Too little memory for anything: operators run one after the other.
TINY = 1
METHODS = {"whole": "", "parts": "block by block", "operators": "operator by operator"}


def limit_for(way: str, model: ir.Model) -> int | None:
    """A limit of memory at which a model is verified that way (with ``no_more_memory``)."""
    whole = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    return {"whole": None, "parts": int(2.5 * whole) - 1, "operators": TINY}[way]


@pytest.fixture
def no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process itself takes none, so that a limit is about the models."""
    monkeypatch.setattr(memory, "resident", lambda: 0)


def weight_of(model: ir.Model, name: str) -> ir.Value:
    return model.graph.initializers[name]


def scale(model: ir.Model, name: str, factor: float) -> None:
    value = weight_of(model, name)
    value.const_value = ir.tensor((value.const_value.numpy() * factor).astype(np.float32))


def permute_ffn(model: ir.Model, layer: int = 0) -> None:
    """Exact in real arithmetic: the sum over the FFN's channels is taken in another order."""
    order = np.random.default_rng(0).permutation(24)
    sites = [("up.weight", 1), ("gate.weight", 1), ("up.bias", 0), ("gate.bias", 0)]
    for name, axis in (*sites, ("down.weight", 0)):
        value = model.graph.initializers.get(f"layers.{layer}.{name}")
        if value is not None:
            value.const_value = ir.tensor(np.take(value.const_value.numpy(), order, axis))


@pytest.mark.usefixtures("no_more_memory")
@pytest.mark.parametrize("way", METHODS)
@pytest.mark.parametrize("style", STYLES)
class TestReassociated:
    def test_another_order_of_summation_is_within_the_bound(self, style, way):
        model = models.build(**STYLES[style])
        before = model.clone()
        permute_ffn(model)
        limit = limit_for(way, model)
        result = verify(before, model, Exactness.REASSOCIATED, max_memory=limit)
        assert result.status == "within bound"
        assert 0 < result.metrics["error"] <= result.metrics["bound"] < 1e-5
        assert METHODS[way] in result.method

    @pytest.mark.parametrize(
        "name", ["layers.0.q.weight", "layers.1.down.weight", "lm_head.weight"]
    )
    def test_a_relative_error_of_1e_4_in_one_weight_is_caught(self, style, way, name):
        model = models.build(**STYLES[style])
        before = model.clone()
        scale(model, name, 1 + 1e-4)
        limit = limit_for(way, model)
        with pytest.raises(VerificationError, match=r"is off by .* is allowed"):
            verify(before, model, Exactness.REASSOCIATED, max_memory=limit)


@pytest.mark.parametrize("limit", [None, TINY])
class TestBitwise:
    def test_the_same_graph_under_other_names_is_equal(self, limit):
        model = models.build()
        before = model.clone()
        for node in model.graph:
            node.name = f"renamed_{node.name}"
        result = verify(before, model, Exactness.BITWISE, max_memory=limit)
        assert str(result) == "exact: bit by bit"
        assert result.method.startswith("ONNX Runtime" if limit is None else "numpy")

    def test_another_order_of_summation_is_not(self, limit):
        model = models.build()
        before = model.clone()
        permute_ffn(model)
        with pytest.raises(VerificationError, match=r"'logits' is not the same bit by bit"):
            verify(before, model, Exactness.BITWISE, max_memory=limit)


def test_a_lowered_model_is_cut_where_the_canonical_one_has_blocks(no_more_memory):
    model = models.build(layers=3)
    Canonicalize(Canonicalize.Options()).call(model, Context(target="ort-cpu"))
    before = model.clone()
    legalize(model, "ort-cpu")
    limit = limit_for("parts", model)
    for pair in ((before, model), (model, before)):
        assert "parts" in verify(*pair, Exactness.REASSOCIATED, max_memory=limit).method


class TestApproximate:
    def test_the_drift_is_measured_and_nothing_refused(self):
        model = models.build()
        before = model.clone()
        scale(model, "lm_head.weight", 1.5)
        result = verify(before, model, Exactness.APPROXIMATE)
        assert result.status == "measured"
        # Roundings of a factor of 1.5 in float32.
        assert result.metrics["relative_l2"] == pytest.approx(0.5, rel=1e-5)


class TestReasons:
    def test_padded_tokens_are_free_to_change(self):
        model = models.build(style="post-norm", norm="layer", kv_heads=4)
        before = model.clone()
        # stream * (2 - mask): doubled where the mask is 0, untouched elsewhere.
        mask = next(v for v in model.graph.inputs if v.name == "attention_mask")
        stream = next(v for n in model.graph for v in n.outputs if v.name == "stream.0")
        uses = list(stream.uses())
        two = add_initializer(model.graph, "two", np.array(2, np.int64))
        axis = add_initializer(model.graph, "last", np.array([-1]))
        factor = ir.node("Sub", [two, mask], name="factor")
        cast = ir.node("Cast", factor.outputs, attributes={"to": 1}, name="cast")
        wide = ir.node("Unsqueeze", [cast.outputs[0], axis], name="wide")
        scaled = ir.node("Mul", [stream, wide.outputs[0]], name="scaled")
        added = [factor, cast, wide, scaled]
        for node in added:
            node.outputs[0].name = f"{node.name}.out"
        model.graph.insert_after(stream.producer(), added)
        for use in uses:
            use.node.replace_input_with(use.idx, scaled.outputs[0])
        assert verify(before, model, Exactness.REASSOCIATED).status == "within bound"

    def test_a_number_that_stops_being_finite_is_caught(self):
        model = models.build()
        before = model.clone()
        scale(model, "lm_head.weight", np.nan)
        with pytest.raises(VerificationError, match="'logits' is not finite"):
            verify(before, model, Exactness.REASSOCIATED)

    def test_other_shapes_are_caught(self):
        model = models.build()
        before = model.clone()
        weight = weight_of(model, "lm_head.weight")
        weight.const_value = ir.tensor(weight.const_value.numpy()[:, :49])
        weight.shape = ir.Shape((32, 49))
        model.graph.outputs[0].shape = ir.Shape(["batch", "sequence", 49])
        with pytest.raises(
            VerificationError, match=r"has shape \[2, 12, 49\], it was \[2, 12, 50\]"
        ):
            verify(before, model, Exactness.REASSOCIATED)

    def test_other_integers_are_caught(self):
        text = (
            '<ir_version: 10, opset_import: ["" : 20]> g (float[N,4] x) => (int64[N] y)'
            " {{ y = ArgMax<axis = 1, keepdims = 0, select_last_index = {0}>({1}) }}"
        )
        flat = text.format(0, "x"), text.format(1, "x")
        before, after = (ir.from_onnx_text(t) for t in flat)
        samples = load_samples({"x": np.zeros((2, 4), np.float32)}, input_specs(before))
        with pytest.raises(VerificationError, match="'y' holds other integers"):
            verify(before, after, Exactness.REASSOCIATED, samples=samples)

    def test_an_input_of_unknown_length_is_said_not_hidden(self):
        model = ir.from_onnx_text(
            '<ir_version: 10, opset_import: ["" : 20]> g (int64[1,5] input_ids, float[3,7] table)'
            " => (float[N,7] y) { y = Gather(table, input_ids) }"
        )
        # Ids up to 31 do not fit into a table of 3 rows that is an input: the run fails.
        model.graph.inputs[1].shape = ir.Shape((3, None))
        text = str(verify(model.clone(), model, Exactness.REASSOCIATED))
        assert text.startswith("not verified: input 'table' has an axis 1")

    def test_an_operator_without_float64_is_compared_in_float32(self):
        text = (
            '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>'
            " g (float[N,4] x) => (float[N,3] y) <float[4,3] w = {1,2,3,4,5,6,7,8,9,1,2,3},"
            " float[4,4] v = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}> {"
            ' h = com.microsoft.CDist<metric = "euclidean">(x, v)  y = MatMul(h, w) }'
        )
        model = ir.from_onnx_text(text)
        result = verify(model.clone(), model, Exactness.REASSOCIATED)
        assert result.status == "within bound"
        assert "float32 against float32" in result.method
        assert "CDist" in result.method
        before = model.clone()
        scale(model, "w", 1.001)
        with pytest.raises(VerificationError):
            verify(before, model, Exactness.REASSOCIATED)

    @pytest.mark.parametrize(
        "fault", [0.5, ModelError("node 'a' failed")], ids=["wrong", "failing"]
    )
    def test_a_faulty_reference_neither_hides_damage_nor_refuses_good_passes(
        self, monkeypatch, fault
    ):
        original = verify_module.ReferenceRunner.run

        def run(self, feed):
            if isinstance(fault, Exception):
                raise fault
            return {n: a * fault for n, a in original(self, feed).items()}

        monkeypatch.setattr(verify_module.ReferenceRunner, "run", run)
        model = models.build()
        before = model.clone()
        permute_ffn(model)
        result = verify(before, model, Exactness.REASSOCIATED)
        assert "float32 against float32" in result.method
        scale(model, "lm_head.weight", 1 + 1e-4)
        with pytest.raises(VerificationError):
            verify(before, model, Exactness.REASSOCIATED)

    def test_no_shared_value_to_cut_at_means_operator_by_operator(self, no_more_memory):
        model = models.build()
        before = model.clone()
        for node in before.graph:
            for value in node.outputs:
                if value.name and value.name.startswith("stream"):
                    value.name = f"old_{value.name}"
        limit = limit_for("parts", model)
        result = verify(before, model, Exactness.REASSOCIATED, max_memory=limit)
        assert result.status == "within bound"
        assert "operator by operator" in result.method


@pytest.mark.parametrize("kv_cache", ["append", "in-place"])
def test_both_forms_of_the_cache_are_proven_against_the_canonical_graph(kv_cache):
    model = models.build(kv_cache=True)
    before = model.clone()
    legalize(model, "ort-cpu", kv_cache=kv_cache)
    result = verify(before, model, Exactness.REASSOCIATED)
    assert result.status == "within bound"
    assert result.probes == 3


class TestProbes:
    def test_one_row_is_padded_and_a_cache_is_filled(self):
        model = models.build(kv_cache=True)
        prefill, step, piece = make_probes(input_specs(model))
        assert prefill.feed["attention_mask"].tolist() == [[1] * 12, [1] * 9 + [0] * 3]
        assert prefill.tokens == 21
        assert prefill.feed["past_key_values.0.key"].shape[2] == 0
        assert step.feed["input_ids"].shape == (2, 1)
        assert piece.feed["input_ids"].shape == (1, 4)
        assert step.feed["past_key_values.1.value"].shape == (2, 2, 7, 8)
        assert step.feed["attention_mask"].shape == (2, 8)
        assert step.feed["position_ids"].tolist() == [[7], [7]]

    def test_tokens_come_from_the_data_where_there_is_some(self):
        model = models.build()
        ids = np.random.default_rng(5).integers(0, 50, (4, 30))
        samples = load_samples({"input_ids": ids}, input_specs(model))
        assert (
            make_probes(input_specs(model), samples)[0].feed["input_ids"].tolist()
            == ids[:2, :12].tolist()
        )

    def test_made_up_probes_are_the_same_every_time(self):
        specs = input_specs(models.build(kv_cache=True))
        a, b = make_probes(specs), make_probes(specs)
        for x, y in zip(a, b, strict=True):
            assert all(np.array_equal(x.feed[n], y.feed[n]) for n in x.feed)

    def test_only_valid_rows_of_tokens_and_caches_are_compared(self):
        probe = make_probes(input_specs(models.build(kv_cache=True)))[0]
        assert probe.rows(np.zeros((2, 12, 50))).shape == (21, 50)
        assert probe.rows(np.zeros((2, 3, 12, 8))).shape == (21, 3, 8)
        assert probe.rows(np.zeros((2, 3, 20, 8))).shape == (21, 3, 8)
        assert probe.rows(np.zeros((2, 32))).shape == (2, 32)
        assert probe.rows(np.zeros(5)).shape == (5,)


class TestParts:
    @given(style=st.sampled_from(sorted(STYLES)), layers=st.integers(1, 3))
    @settings(max_examples=15)
    def test_parts_run_one_after_the_other_give_the_whole(self, style, layers):
        config = models.Config(layers=layers, **STYLES[style])
        model, feed = models.build(config), models.feed(config, past=3)
        expected = OrtRunner(model, optimize=False).run(feed)
        known, found = dict(feed), {}
        cuts = shared_cuts(model, model)
        assert len(cuts) == layers
        parts = segments(model, cuts)
        assert len(parts) == layers + 1
        for segment in parts:
            part = segment.part(model, {n: a.ndim for n, a in known.items()})
            runner = OrtRunner(model, part=part, optimize=False)
            outputs = runner.run({n: known[n] for n in runner.input_names})
            known.update(outputs)
            found.update(outputs)
        for name, array in expected.items():
            assert np.array_equal(found[name], array), name

    def test_a_part_holds_the_weights_of_its_own_layer_only(self):
        model = models.build(layers=3)
        middle = segments(model, shared_cuts(model, model))[2]
        part = middle.part(model, {str(v.name): 3 for v in middle.inputs})
        proto, large = skeleton(model, part=part)
        names = {t.name for t in proto.graph.initializer} | set(large)
        layers = {n.split(".")[1] for n in names if n.startswith("layers.")}
        assert layers == {"1"}


@given(seed=st.integers(0, 1000), exponent=st.floats(-3, 0))
@settings(max_examples=20)
def test_the_bound_separates_rounding_from_damage(seed, exponent):
    model = models.build(layers=1, seed=seed)
    before = model.clone()
    permute_ffn(model)
    assert verify(before, model, Exactness.REASSOCIATED, seed=seed).status == "within bound"
    scale(model, "layers.0.o.weight", 1 + 10**exponent)
    with pytest.raises(VerificationError):
        verify(before, model, Exactness.REASSOCIATED, seed=seed)


class TestQuantized:
    """A rounding of float32 that tips a code over is no damage; what follows from it may be big."""

    @pytest.mark.parametrize("per_token", [(), (".o.", ".down.")])
    def test_the_lowered_form_is_proven_equal(self, per_token):
        model = models.build(layers=4)
        quantize(model, per_token=per_token)
        lowered = model.clone()
        legalize(lowered, "ort-cpu")
        assert any(node.domain == "com.microsoft" for node in lowered.graph)
        raised = lowered.clone()
        Canonicalize().call(raised, Context())
        for before, after in ((model, lowered), (lowered, raised)):
            found = verify(before, after, Exactness.REASSOCIATED)
            # Float64 throughout; what is left is that a quotient is spelled as a product.
            assert found.metrics["error"] < 1e-12
            assert found.method.startswith("both in float64")

    def test_damage_is_found(self):
        model = models.build(layers=2)
        quantize(model)
        after = model.clone()
        name = next(n for n in after.graph.initializers if n.endswith("0.o.weight_scale"))
        scale(after, name, 1.5)
        with pytest.raises(VerificationError, match="both in float64"):
            verify(model, after, Exactness.REASSOCIATED)


def test_weights_alone_in_int8_are_compared_with_float_activations() -> None:
    """Left alone, ONNX Runtime rounds the activations of a MatMul to 8 bits, of a Gemm not."""
    codes = ", ".join(str(n) for n in np.random.default_rng(0).integers(-127, 128, 16))
    before = graph(
        "d = DequantizeLinear<axis = 0>(w, s)  y = Gemm<transB = 1>(x, d, b)",
        inputs="float[S,4] x", output="float[S,4] y",
        constants=f"int8[4,4] w = {{{codes}}}, float[4] s = {{0.013, 0.0102, 0.0094, 0.0093}}, "
        "float[4] b = {0.1, 0.2, 0.3, 0.4}",
    )  # fmt: skip
    after = before.clone()
    Canonicalize().call(after, Context())
    assert "MatMul" in ops(after)
    assert verify(before, after, Exactness.REASSOCIATED).metrics["error"] < 1e-6
