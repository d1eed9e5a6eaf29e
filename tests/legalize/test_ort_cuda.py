"""What lies on the host, and is not copied to the GPU any more."""

from __future__ import annotations

import ml_dtypes
import models
import numpy as np
import pytest
from rule_case import graph

from optimizer.conformance.encoders import Encoder, build_encoder, encoder_feed
from optimizer.legalize import legalize, ort_cuda
from optimizer.pass_base import Context
from optimizer.runners.ort import OrtRunner
from passes import get_pass
from passes.canonicalize import Canonicalize

PAST = "s = Shape<start = 1, end = 2>(x)  n = Squeeze(s)  r = Range(zero, n, one)"
CONSTANTS = "int64 zero = {0}, int64 one = {1}, int64[1] first = {0}, int64[1] two = {2}"


def _case(text: str, inputs: str = "int64[1,S] x", output: str = "int64[S] y"):
    return graph(f"{PAST}  {text}", inputs=inputs, output=output, constants=CONSTANTS)


@pytest.mark.parametrize(
    ("text", "output"),
    [
        ("y = Add(r, n)", "int64[S] y"),
        ("y = Add(n, r)", "int64[S] y"),
        ("y = Add(r, s)", "int64[S] y"),
        ("u = Unsqueeze(r, first)  y = Add(u, n)", "int64[1,S] y"),
        ("m = Mul(n, n)  y = Add(r, m)", "int64[S] y"),
    ],
)
def test_numbers_of_the_host_move_into_the_range(text, output):
    model = _case(text, output=output)
    feed = {"x": np.zeros((1, 5), np.int64)}
    before = OrtRunner(model).run(feed)["y"]
    assert len(list(ort_cuda.copies(model))) == 1
    report = legalize(model, "ort-cuda")
    assert report.details["rewrites"] == {"range": 1}
    assert not report.skipped
    after = OrtRunner(model).run(feed)["y"]
    assert after.tolist() == before.tolist()
    assert legalize(model, "ort-cuda").details["rewrites"] == {}


@pytest.mark.parametrize(
    ("text", "inputs", "output", "copied"),
    [
        # A number that lies on the GPU would have to be copied from there for Range.
        ("y = Add(r, k)", "int64[1,S] x, int64 k", "int64[S] y", 0),
        # Not one number for all.
        ("w = Shape(x)  y = Add(r, w)", "int64[1,2] x", "int64[2] y", 1),
        ("c = Cast<to = 1>(r)  f = Cast<to = 1>(n)  y = Add(c, f)", "int64[1,S] x",
         "float[S] y", 1),
        ("y = Mul(r, n)", "int64[1,S] x", "int64[S] y", 1),
    ],
)  # fmt: skip
def test_other_sums_stay_and_their_copies_are_told(text, inputs, output, copied):
    model = _case(text, inputs, output)
    report = legalize(model, "ort-cuda")
    assert report.details["rewrites"] == {}
    assert len(report.skipped) == copied
    assert all("copied to the GPU" in skip.reason for skip in report.skipped)


def test_a_length_that_is_computed_on_the_gpu_is_told():
    model = graph(
        "n = ReduceMax<keepdims = 0>(x)  y = Range(zero, n, one)",
        inputs="int64[1,S] x", output="int64[T] y", constants=CONSTANTS,
    )  # fmt: skip
    (skip,) = legalize(model, "ort-cuda").skipped
    assert "'n' is copied from the GPU" in skip.reason
    assert not legalize(model, "ort-cpu").skipped


@pytest.mark.parametrize("past", [0, 3])
def test_a_decoder_with_a_cache_needs_no_copies(past):
    config = models.Config(kv_cache=True)
    model = models.build(config)
    feed = models.feed(config, sequence=4, past=past)
    before = OrtRunner(model).run(feed)["logits"]
    report = legalize(model, "ort-cuda")
    assert not report.skipped
    np.testing.assert_array_equal(OrtRunner(model).run(feed)["logits"], before)


HEADS = "k4 = Reshape(k, apart)  s = ReduceSum<keepdims = {keep}>(k4, {axis})  y = Mul(s, s)"
APART = "int64[4] apart = {0, 0, 2, 4}, int64[1] middle = {2}, int64[1] rows = {1}"


def _sum(keep: int = 0, axis: str = "middle", output: str = "float[B,S,4] y"):
    return graph(HEADS.format(keep=keep, axis=axis), inputs="float[B,S,8] k", output=output,
                 constants=APART)  # fmt: skip


def test_a_sum_over_heads_is_a_product():
    model = _sum()
    feed = {"k": np.random.default_rng(0).standard_normal((2, 5, 8), dtype=np.float32)}
    before = OrtRunner(model).run(feed)["y"]
    assert legalize(model, "ort-cuda").details["rewrites"] == {"sum of heads": 1}
    np.testing.assert_allclose(OrtRunner(model).run(feed)["y"], before, rtol=1e-6)


@pytest.mark.parametrize(
    "model", [_sum(keep=1, output="float[B,S,1,4] y"), _sum(axis="rows", output="float[B,2,4] y")]
)
def test_other_sums_over_an_axis_stay(model):
    assert legalize(model, "ort-cuda").details["rewrites"] == {}


ATTENTION = (
    "l = Log(s)  t = Transpose<perm = [0, 2, 1]>(l)  m = Unsqueeze(t, middle)"
    "  y = Attention<q_num_heads = 2, kv_num_heads = {heads}, scale = {scale}>(q, k, v, m)"
)


def _attention(text=ATTENTION, heads=2, scale=0.5, dtype="float16", sizes="B,T,1"):
    width = 4 * heads
    return graph(
        text.format(heads=heads, scale=scale),
        inputs=f"{dtype}[B,S,8] q, {dtype}[B,T,{width}] k, {dtype}[B,T,{width}] v, "
        f"{dtype}[{sizes}] s",
        output=f"{dtype}[B,S,8] y", constants="int64[1] middle = {1}",
    )  # fmt: skip


def _proportional(feed, heads, scale):
    """Attention over tokens that are there as often as their size says, in float64."""
    q, k, v = (feed[name].astype(np.float64) for name in "qkv")
    batch, rows, _ = q.shape
    q = q.reshape(batch, rows, 2, 4).swapaxes(1, 2)
    k, v = (
        np.repeat(x.reshape(batch, -1, heads, 4).swapaxes(1, 2), 2 // heads, axis=1) for x in (k, v)
    )
    scores = (
        np.exp(scale * q @ k.swapaxes(2, 3)) * feed["s"].astype(np.float64)[:, None, None, :, 0]
    )
    result = (scores / scores.sum(-1, keepdims=True)) @ v
    return result.swapaxes(1, 2).reshape(batch, rows, 8)


@pytest.mark.parametrize("heads", [2, 1])
@pytest.mark.parametrize("scale", [0.5, 0.05])
def test_keys_carry_the_sizes_of_their_tokens(heads, scale):
    model = _attention(heads=heads, scale=scale)
    rng = np.random.default_rng(0)
    feed = {
        name: rng.standard_normal((2, rows, width)).astype(np.float16)
        for name, rows, width in (("q", 3, 8), ("k", 5, 4 * heads), ("v", 5, 4 * heads))
    }
    feed["s"] = rng.integers(1, 12, (2, 5, 1)).astype(np.float16)
    assert legalize(model, "ort-cuda").details["rewrites"] == {"key mask": 1}
    (node,) = [n for n in model.graph if n.op_type == "Attention"]
    assert len(node.inputs) == 3
    found = OrtRunner(model).run(feed)["y"]
    # some roundings to float16 (5e-4) of numbers up to 2, among them logarithms up to 2.5
    np.testing.assert_allclose(found, _proportional(feed, heads, scale), atol=5e-3)


@pytest.mark.parametrize(
    "model",
    [
        _attention(dtype="float"),
        _attention(sizes="1,T,1"),
        _attention(ATTENTION.replace("Log(s)", "Identity(s)")),
        _attention(ATTENTION.replace("scale =", "softcap = 5.0, scale =")),
    ],
)
def test_other_masks_stay(model):
    assert "key mask" not in legalize(model, "ort-cuda").details["rewrites"]


def test_other_targets_keep_the_mask():
    assert "key mask" not in legalize(_attention(), "tensorrt-11").details["rewrites"]


@pytest.mark.parametrize("text", ["y = Pad(h, pads)", "y = Reciprocal(h)", "y = Round(h)"])
def test_operators_without_a_kernel_for_bfloat16_compute_in_float32(text):
    model = graph(
        f"h = Mul(x, x)  {text}", inputs="bfloat16[2,3] x", output="bfloat16[2,N] y",
        constants="int64[4] pads = {0, 0, 0, 1}",
    )  # fmt: skip
    feed = {"x": np.linspace(0.5, 3, 6).reshape(2, 3).astype(ml_dtypes.bfloat16)}
    before = OrtRunner(model).run(feed)["y"]
    assert legalize(model, "ort-cuda").details["rewrites"] == {"bfloat16": 1}
    assert [node.op_type for node in model.graph].count("Cast") == 2
    after = OrtRunner(model).run(feed)["y"]
    assert after.dtype == before.dtype
    np.testing.assert_array_equal(after.astype(np.float32), before.astype(np.float32))


def test_what_a_comparison_gives_needs_no_rounding():
    model = graph("y = Less(x, x)", inputs="bfloat16[2,3] x", output="bool[2,3] y")
    assert legalize(model, "ort-cuda").details["rewrites"] == {"bfloat16": 1}
    assert [node.op_type for node in model.graph] == ["Cast", "Cast", "Less"]


@pytest.mark.parametrize("dtype", ["float16", "float"])
def test_other_types_stay_as_they_are(dtype):
    model = graph("y = Round(x)", inputs=f"{dtype}[2,3] x", output=f"{dtype}[2,3] y")
    assert legalize(model, "ort-cuda").details["rewrites"] == {}


@pytest.mark.parametrize("name", ["tome", "crossget", "prune-tokens"])
def test_reduced_models_in_float16_compute_the_same_as_elsewhere(name):
    """Sizes in the keys, sums over heads as products; batches too."""
    outputs = []
    for target in ("ort-cuda", "ort-cpu"):
        encoder = Encoder(head="class")
        model = build_encoder(encoder)
        Canonicalize().call(model, Context())
        pass_class = get_pass(name)
        # half precision before tokens: both targets choose by the same numbers
        get_pass("fp16")().call(model, Context(target="ort-cuda"))
        assert pass_class(pass_class.Options(r=2)).call(model, Context(target=target)).applied == 3
        if target == "ort-cuda":
            rewrites = legalize(model, target).details["rewrites"]
            assert ("key mask" in rewrites) == (name != "prune-tokens")
        feed = encoder_feed(encoder)
        outputs.append(next(iter(OrtRunner(model).run(feed).values())).astype(np.float64))
    # float16 rounds to 5e-4 at every step
    np.testing.assert_allclose(*outputs, atol=2e-2 * np.abs(outputs[1]).max())


def test_the_report_says_that_fewer_tokens_pay_in_batches():
    notes = []
    for target in ("ort-cuda", "ort-cpu", "tensorrt-rtx"):
        model = build_encoder(Encoder(head="class"))
        Canonicalize().call(model, Context())
        tome = get_pass("tome")
        notes.append(tome(tome.Options(r=2)).call(model, Context(target=target)).notes)
    assert "in batches" in notes[0][0]
    assert notes[1:] == [(), ()]
