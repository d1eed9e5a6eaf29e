from __future__ import annotations

import golden_cases
import models
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from rule_case import feed, graph

from optimizer.blocks import Block, find_blocks
from optimizer.pass_base import Context
from optimizer.runners.reference import ReferenceRunner
from passes.canonicalize import STEPS, Canonicalize

CASES = golden_cases.cases("canonicalize")
FIRES = [case for case in CASES if not case.title.startswith("refuses:")]
REFUSES = [case for case in CASES if case.title.startswith("refuses:")]


def _run(model: ir.Model):
    return Canonicalize().call(model, Context())


def _bytes(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def _assert_same_numbers(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    arrays = feed(ir.from_proto(before))
    wanted = ReferenceEvaluator(before).run(None, arrays)
    got = ReferenceEvaluator(after).run(None, arrays)
    for old, new in zip(wanted, got, strict=True):
        # 16 roundings of float32: the bound of exact passes.
        bound = 16 * np.finfo(np.float32).eps * max(1.0, float(np.abs(old).max()))
        assert float(np.abs(old - new).max()) <= bound


@pytest.mark.parametrize("case", FIRES, ids=lambda case: case.name)
def test_raises(case):
    model = case.model()
    report = _run(model)
    assert golden_cases.text(model) == golden_cases.text(case.after)
    _assert_same_numbers(case.before, case.after)
    assert report.modified == (case.name != "canonical_already")
    assert not report.skipped


@pytest.mark.parametrize("case", REFUSES, ids=lambda case: case.name)
def test_leaves_alone_and_says_why(case):
    model = case.model()
    report = _run(model)
    assert golden_cases.text(model) == golden_cases.text(case.after)
    assert not report.modified
    assert [skip.reason for skip in report.skipped] == [case.title.removeprefix("refuses: ")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_second_run_changes_nothing(case):
    model = case.model()
    _run(model)
    first = _bytes(model)
    assert not _run(model).modified
    assert _bytes(model) == first


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_input_gives_the_same_bytes(case):
    models_ = case.model(), case.model()
    for model in models_:
        _run(model)
    assert _bytes(models_[0]) == _bytes(models_[1])


STYLES = {
    "llama": {},
    "kv cache": {"kv_cache": True},
    "bert": {"style": "post-norm", "norm": "layer", "gated": False, "activation": "gelu"},
    "phi": {"style": "parallel", "norm": "layer", "gated": False, "activation": "gelu-tanh"},
    "quick-gelu": {"gated": False, "activation": "quick-gelu", "bias": True},
}


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES.keys())
def test_canonical_layers_stay_as_they_are(style):
    """Only the arithmetic of the mask may get shorter."""
    model = models.build(**style)
    layers = [_described(block) for block in find_blocks(model).blocks]
    assert not _run(model).skipped
    assert [_described(block) for block in find_blocks(model).blocks] == layers
    assert not _run(model).modified


def _described(block: Block) -> list[str]:
    attention, mlp = block.attention, block.mlp
    linears = [attention.q, attention.k, attention.v, attention.o, mlp.up, mlp.gate, mlp.down]
    weights = [linear.weight.name for linear in linears if linear is not None]
    stream = [value.name for value in (block.input, block.hidden, block.output) if value]
    return [*weights, *stream, mlp.activation, block.style.value]


def test_the_steps_are_named_and_ordered():
    names = [step.name for step in STEPS]
    order = ["inline", "constants", "opset", "linears", "norms", "activations", "heads"]
    assert [name for name in names if name in order] == order


# A stack of layers in random spellings. D is the width of the stream.
_NORMS = {
    "RMSNormalization": (
        "p{i} = Mul(x{i}, x{i})  m{i} = ReduceMean<axes = [-1]>(p{i})  v{i} = Add(m{i}, eps)"
        "  s{i} = Sqrt(v{i})  r{i} = Reciprocal(s{i})  q{i} = Mul(x{i}, r{i})"
        "  n{i} = Mul(scale, q{i})",
        "p{i} = Pow(x{i}, two)  m{i} = ReduceMean<axes = [2]>(p{i})  v{i} = Add(eps, m{i})"
        "  s{i} = Sqrt(v{i})  q{i} = Div(x{i}, s{i})  n{i} = Mul(q{i}, scale)",
    ),
    "LayerNormalization": (
        "u{i} = ReduceMean<axes = [-1]>(x{i})  d{i} = Sub(x{i}, u{i})  p{i} = Pow(d{i}, two)"
        "  m{i} = ReduceMean<axes = [-1]>(p{i})  v{i} = Add(m{i}, eps)  s{i} = Sqrt(v{i})"
        "  q{i} = Div(d{i}, s{i})  g{i} = Mul(q{i}, scale)  n{i} = Add(g{i}, shift)",
    ),
}
_UPS = (
    "h{i} = MatMul(n{i}, up)",
    "t{i} = Transpose<perm = [1, 0]>(up_t)  k{i} = MatMul(n{i}, t{i})  h{i} = Add(bias, k{i})",
    "f{i} = Reshape(n{i}, flat)  k{i} = Gemm<transB = 1>(f{i}, up_t, bias)  z{i} = Shape(n{i})"
    "  w{i} = Slice(z{i}, zero, ends)  y{i} = Concat<axis = 0>(w{i}, six)"
    "  h{i} = Reshape(k{i}, y{i})",
)
_ACTIVATIONS = {
    "Gelu": (
        "a{i} = Div(h{i}, root)  e{i} = Erf(a{i})  b{i} = Add(e{i}, one)  c{i} = Mul(h{i}, half)"
        "  o{i} = Mul(c{i}, b{i})",
    ),
    "Sigmoid": ("a{i} = Sigmoid(h{i})  o{i} = Mul(a{i}, h{i})",),
    "Relu": ("o{i} = Relu(h{i})",),
}
_CONSTANTS = {
    "up": (4, 6),
    "up_t": (6, 4),
    "down": (6, 4),
    "bias": (6,),
    "scale": (4,),
    "shift": (4,),
}
_NUMBERS = (
    "float eps = {0.01}, float two = {2}, float one = {1}, float half = {0.5}, "
    "float root = {1.41421354}, int64[2] flat = {-1, 4}, int64[1] zero = {0}, "
    "int64[1] ends = {2}, int64[1] six = {6}"
)


@st.composite
def _stacks(draw):
    """(ONNX text, what must be found)."""
    wanted, nodes = [], []
    layers = draw(st.integers(1, 3))
    for index in range(layers):
        norm = draw(st.sampled_from(sorted(_NORMS)))
        activation = draw(st.sampled_from(sorted(_ACTIVATIONS)))
        parts = (
            draw(st.sampled_from(_NORMS[norm])),
            draw(st.sampled_from(_UPS)),
            draw(st.sampled_from(_ACTIVATIONS[activation])),
            "l{i} = MatMul(o{i}, down)  x{j} = Add(x{i}, l{i})",
        )
        nodes += [part.format(i=index, j=index + 1) for part in parts]
        wanted += [norm, activation]
    random = np.random.default_rng(draw(st.integers(0, 99)))
    held = ", ".join(
        f"float[{','.join(map(str, shape))}] {name} = "
        f"{{{', '.join(f'{number:.4f}' for number in random.normal(size=shape).reshape(-1))}}}"
        for name, shape in _CONSTANTS.items()
    )
    body = "  ".join(nodes)
    text = (
        f'<ir_version: 8, opset_import: ["" : 13]> g (float[B,S,4] x0) => (float[B,S,4] x{layers})'
        f" <{_NUMBERS}, {held}> {{ {body} }}"
    )
    return text, wanted


@given(stack=_stacks(), batch=st.integers(1, 2), sequence=st.sampled_from([1, 3]))
def test_every_mix_of_spellings_is_raised_within_the_bound(stack, batch, sequence):
    text, wanted = stack
    before = onnx.parser.parse_model(text)
    model = ir.from_proto(before)
    original = model.clone()
    report = _run(model)
    found = [node.op_type for node in model.graph]
    assert not report.skipped
    assert [op for op in found if op in {*_NORMS, *_ACTIVATIONS}] == wanted
    assert not {"Gemm", "Transpose", "Reshape", "ReduceMean", "Shape"} & set(found)
    assert not _run(model).modified
    array = np.random.default_rng(0).normal(size=(batch, sequence, 4)).astype(np.float32)
    arrays = {"x0": array}
    (truth,) = ReferenceRunner(original, double=True).run(arrays).values()
    (old,) = ReferenceRunner(original).run(arrays).values()
    (new,) = ReferenceRunner(model).run(arrays).values()
    # Twice the original's own error, or 16 roundings of the largest number.
    bound = max(2 * np.abs(old - truth).max(), 16 * 2.0**-23 * np.abs(truth).max())
    assert np.abs(new - truth).max() <= bound


def test_what_shapes_found_late_make_plainer_is_plain_after_one_run():
    nodes = "f = Reshape(x, rows)  y = Gemm<beta = 0.0>(f, w, b)"
    constants = "int64[2] rows = {-1, 1}, float[1,1] w = {2}, float[1] b = {3}"
    model = graph(nodes, inputs="float[B,S,1] x", output="float[M,1] y", constants=constants)
    _run(model)
    assert "Add" not in {node.op_type for node in model.graph}
    assert not _run(model).modified
