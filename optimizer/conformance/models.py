"""The models that every pass must survive: small, made here, each odd in its own way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir

from optimizer.conformance.decoders import build
from optimizer.conformance.encoders import build_encoder


@dataclass(frozen=True)
class Sample:
    """One model of the suite.

    Attributes:
        name: In reports.
        build: Makes a new one, always the same.
        runs: Whether ONNX Runtime runs it without further libraries.
    """

    name: str
    build: Callable[[], ir.Model]
    runs: bool = True


_HEAD = '<ir_version: 10, opset_import: ["" : 18, "acme" : 1, "local" : 1]>\n'

#: ONNX text by name. Inputs whose names begin with "w" become random initializers; those beginning
#: with "wi" stay inputs as well, so that a caller may override them.
_TEXTS = {
    "perceptron": """
        g (float[N, 16] x, float[16, 32] w1, float[32] w2, float[32, 8] w3) => (float[N, 8] y) {
            a = MatMul (x, w1)  b = Add (a, w2)  c = Relu (b)  y = MatMul (c, w3)
        }""",
    "convolution": """
        g (float[N, 3, 8, 8] image, float[4, 3, 3, 3] w1, float[4] w2, float[5, 4] w3, float[5] w4)
            => (float[N, 5] y) {
            a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, w1, w2)
            b = Relu (a)  c = GlobalAveragePool (b)  d = Flatten (c)
            y = Gemm <transB = 1> (d, w3, w4)
        }""",
    "branches": """
        g (float[N, 8] x, bool flag, float[8, 8] w1) => (float[N, 8] y) {
            a = MatMul (x, w1)
            y = If (flag) <
                then_branch = t () => (float[N, 8] b) { b = Relu (a) },
                else_branch = e () => (float[N, 8] c) { c = MatMul (a, w1) }
            >
        }""",
    "nothing": "g (float[N, 4] x) => (float[N, 4] x) { }",
    "tied-weight": """
        g (int64[N, S] ids, float[10, 8] w1) => (float[N, S, 10] y) {
            a = Gather (w1, ids)  b = Tanh (a)
            t = Transpose <perm = [1, 0]> (w1)  y = MatMul (b, t)
        }""",
    "overridable-weight": """
        g (float[N, 8] x, float[8, 8] wi1, float[8] w2) => (float[N, 8] y) {
            a = MatMul (x, wi1)  y = Add (a, w2)
        }""",
    "half": """
        g (float16[N, 8] x, float16[8, 8] w1, float16[8] w2) => (float16[N, 8] y) {
            a = MatMul (x, w1)  b = Add (a, w2)  y = Sigmoid (b)
        }""",
    "custom-operator": """
        g (float[N, 8] x, float[8, 8] w1) => (float[N, 8] y) {
            a = MatMul (x, w1)  b = acme.Twist <angle = 3> (a, w1)  y = Relu (b)
        }""",
    "dynamic-shapes": """
        g (float[B, S, 8] x, float[8, 8] w1) => (float[B, ?, 4] y) {
            s = Shape (x)
            zero = Constant <value_ints = [0]> ()  one = Constant <value_ints = [1]> ()
            b = Slice (s, zero, one)  rest = Constant <value_ints = [-1, 4]> ()
            shape = Concat <axis = 0> (b, rest)
            a = MatMul (x, w1)  y = Reshape (a, shape)
        }""",
    "function": """
        g (float[N, 8] x, float[8, 8] w1) => (float[N, 8] y) {
            a = MatMul (x, w1)  y = local.Smooth (a)
        }
        <domain: "local", opset_import: ["" : 18]>
        Smooth (x) => (y) { s = Sigmoid (x)  y = Mul (x, s) }""",
    "loose-ends": """
        g (float[N, 8] x, float[N] unused, float[8, 8] w1, float[4] w2)
            => (float[N, 8] y, float[N, 8] a) {
            a = MatMul (x, w1)  b = Identity (a)  c = Neg (x)  y = Relu (b)
        }""",
    "ones": """
        g (float[N, 8] x, float[8, 8] w1) => (float[N, 8] y) {
            one = Constant <value_float = 1.0> ()
            a = Mul (x, one)  b = MatMul (a, w1)  c = Mul (one, b)  y = Relu (c)
        }""",
}
_TYPES = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16}


def _from_text(name: str) -> ir.Model:
    proto = onnx.parser.parse_model(_HEAD + _TEXTS[name].strip())
    rng = np.random.default_rng(0)
    for value in [value for value in proto.graph.input if value.name.startswith("w")]:
        tensor = value.type.tensor_type
        shape = [dim.dim_value for dim in tensor.shape.dim]
        array = rng.normal(0, 0.3, shape).astype(_TYPES[tensor.elem_type])
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
        if not value.name.startswith("wi"):
            proto.graph.input.remove(value)
    used = {node.domain for node in proto.graph.node}
    for entry in [entry for entry in proto.opset_import if entry.domain not in {"", *used}]:
        proto.opset_import.remove(entry)
    model: ir.Model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    return model


def _quantized() -> ir.Model:
    """A perceptron with int8 weights and activations between Q/DQ pairs."""
    text = """
        g (float[N, 8] x) => (float[N, 4] y)
        <float s = {0.05}, int8 z = {0}, float[4] ws = {0.01, 0.02, 0.03, 0.04}> {
            q = QuantizeLinear (x, s, z)  d = DequantizeLinear (q, s, z)
            v = DequantizeLinear <axis = 1> (w8, ws)  y = MatMul (d, v)
        }"""
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>' + text.strip())
    codes = np.random.default_rng(0).integers(-127, 128, (8, 4)).astype(np.int8)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(codes, "w8"))
    model: ir.Model = ir.from_proto(proto)
    return model


MODELS: tuple[Sample, ...] = (
    Sample("decoder", partial(build, layers=3, kv_cache=True, bias=True)),
    Sample("encoder", partial(build, style="post-norm", norm="layer", bias=True, rotary=False,
                              gated=False, activation="gelu")),
    Sample("vision", build_encoder),
    Sample("parallel", partial(build, style="parallel", norm="layer", bias=True)),
    Sample("shared-weights", partial(build, shared_weights=True, mask=False)),
    *(Sample(name, partial(_from_text, name), name != "custom-operator") for name in _TEXTS),
    Sample("quantized", _quantized),
)  # fmt: skip
