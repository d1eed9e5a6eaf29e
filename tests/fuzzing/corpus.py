"""Small real models of every kind, to be damaged: what a loader has to tell apart."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import models
import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import onnx.parser
import onnx_ir as ir
from fuzzing.generate import make_case

from optimizer.model_io import load_model, save_model

_ROOT = Path(__file__).resolve().parent.parent.parent
_SHIPPED = _ROOT / "benchmarks" / "models" / "stories12l" / "stories12l.onnx"

_TEXTS = {
    "branches": """<ir_version: 10, opset_import: ["" : 20]>
g (bool p, float[B,4] x) => (float[B,4] y, float[B,4] w) <float[4] one = {1, 1, 1, 1},
  int64 n = {3}, bool t = {1}> {
  z = Add(x, one)
  h = If (p) <then_branch = a () => (float[B,4] u) <float[4] k = {2, 2, 2, 2}> { m = Mul(z, k)
      u = If (t) <then_branch = aa () => (float[B,4] uu) { uu = Tanh(m) },
                  else_branch = ab () => (float[B,4] ub) { ub = Neg(z) }> },
    else_branch = b () => (float[B,4] v) { c = Constant <value_float = 3.0> ()  v = Sub(z, c) }>
  y = Loop (n, t, h) <body = l (int64 i, bool go, float[B,4] s) => (bool on, float[B,4] r)
      { on = Identity(go)  q = Mul(s, one)  r = Tanh(q) }>
  w = Relu(y) }""",
    "scan": """<ir_version: 10, opset_import: ["" : 20]>
g (float[3,4] x, float[4] s) => (float[4] e, float[3,4] ys) <float[4] k = {1, 2, 3, 4}> {
  e, ys = Scan <num_scan_inputs = 1, body = b (float[4] a, float[4] v) => (float[4] o, float[4] f)
      { o = Add(a, v)  f = Mul(o, k) }> (s, x) }""",
    "functions": """<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
g (float[B,4] x) => (float[B,4] y) <float[4,4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}> {
  a = own.act <slope: float = 0.3> (x)  b = own.lin (a, w)  y = own.act <slope: float = 0.1> (b) }
<domain: "own", opset_import: ["" : 20, "own" : 1]>
act <slope: float = 0.01> (v) => (r) { r = LeakyRelu <alpha: float = @slope> (v) }
<domain: "own", opset_import: ["" : 20, "own" : 1]>
lin (v, m) => (r) { h = MatMul (v, m)  r = own.act (h) }""",
    "quantized": """<ir_version: 10, opset_import: ["" : 21]>
g (float[B,4] x) => (float[B,2] y) <float s = {0.05}, int8 z = {0},
  int8[4,2] w = {1,2,3,4,5,6,7,8}, float[2] ws = {0.1, 0.2}, float[2] b = {1, 2}> {
  q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)
  v = DequantizeLinear <axis = 1> (w, ws)
  m = MatMul(d, v)  y = Add(m, b) }""",
    "integers": """<ir_version: 10, opset_import: ["" : 20]>
g (float[B,S,4] x) => (float[B,M] y, int64[3] s) <int64[1] zero = {0},
  int64[1] one = {1}, int64[1] rest = {-1}> {
  s = Shape(x)  b = Slice(s, zero, one)  t = Concat <axis = 0> (b, rest)  y = Reshape(x, t) }""",
    "sequences": """<ir_version: 10, opset_import: ["" : 20]>
g (float[B,4] x, string[N] t) => (float[B,4] y, string[N] u) <int64 i = {0}> {
  q = SequenceConstruct(x, x)  y = SequenceAt(q, i)  u = Identity(t) }""",
    "fused": """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
g (float[B,S,4] x) => (float[B,S,4] y) <float[4] v = {1, 2, 3, 4},
  float[4,4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}> {
  a = com.microsoft.FastGelu(x, v)
  n = com.microsoft.SkipLayerNormalization <epsilon = 0.00001> (a, x, v, v)
  y = com.microsoft.FusedMatMul <transB = 1, alpha = 0.5> (n, w) }""",
    "norm": """<ir_version: 8, opset_import: ["" : 13]>
g (float[B,S,4] x) => (float[B,S,4] y) <float two = {2}, float eps = {0.00001},
  float[4] k = {1, 2, 3, 4}> {
  u = ReduceMean <axes = [-1]> (x)  d = Sub(x, u)  p = Pow(d, two)  m = ReduceMean <axes = [-1]> (p)
  v = Add(m, eps)  r = Sqrt(v)  q = Div(d, r)  g1 = Mul(q, k)  y = Add(g1, k) }""",
}  # fmt: skip


@dataclass(frozen=True)
class Seed:
    """A model file and what lies beside it.

    Attributes:
        name: For the report.
        model: The ``.onnx`` file.
        files: Other files of its folder, by name.
    """

    name: str
    model: bytes
    files: Mapping[str, bytes] = field(default_factory=dict)

    def proto(self) -> onnx.ModelProto:
        return onnx.ModelProto.FromString(self.model)


def random_seed(r: random.Random) -> Seed:
    """One of the fixed seeds, or a random graph."""
    fixed = fixed_seeds()
    if r.randrange(100) < 45:
        return Seed("random graph", make_case(r).model.SerializeToString())
    return fixed[r.randrange(len(fixed))]


@functools.cache
def fixed_seeds() -> tuple[Seed, ...]:
    """All others."""
    seeds = [
        Seed(name, onnx.parser.parse_model(text).SerializeToString())
        for name, text in _TEXTS.items()
    ]
    seeds += [_special(), _sparse(), _narrow()]
    seeds += [_built("llama", "never", kv_cache=True), _built("llama data", "always")]
    seeds.append(_built("bert", "always", style="post-norm", norm="layer", gated=False, bias=True))
    seeds.append(_scattered())
    seeds.append(_shipped())
    return tuple(seeds)


def _built(name: str, external: str, **style: object) -> Seed:
    """A model of ``models.build`` as this project writes it."""
    model = models.build(layers=1, hidden=16, heads=2, kv_heads=1, ffn=24, vocab=20, **style)
    return _written(name, model, external)


def _written(name: str, model: ir.Model, external: str) -> Seed:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path, *rest = save_model(model, Path(folder) / "model.onnx", external)  # type: ignore[arg-type]
        return Seed(name, path.read_bytes(), {item.name: item.read_bytes() for item in rest})


def _shipped() -> Seed:
    """The first layer of the shipped model."""
    model = load_model(_SHIPPED)
    ends = [node.outputs[0] for node in model.graph if node.op_type == "Add"]
    wide = [v for v in ends if v.shape is not None and v.shape[-1] == 128]
    model.graph.outputs[:] = wide[1:2]
    wide[1].type = ir.TensorType(ir.DataType.FLOAT)
    from optimizer.graph import remove_dead

    remove_dead(model)
    return _written("stories12l", model, "never")


def _special() -> Seed:
    """Metadata, training info, annotations, documentation."""
    model = onnx.parser.parse_model(_TEXTS["norm"])
    for key in ("optimize.recipe", "optimize.kv_groups", "optimize.kv_cache", "author"):
        model.metadata_props.add(key=key, value="{}")
    model.producer_name, model.doc_string = "somebody", "a model"
    model.graph.doc_string = "its graph"
    model.graph.node[0].metadata_props.add(key="optimize.group", value="0,1")
    info = model.training_info.add()
    info.initialization.CopyFrom(oh.make_graph([], "init", [], []))
    note = model.graph.quantization_annotation.add(tensor_name="x")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="eps")
    return Seed("metadata", model.SerializeToString())


def _sparse() -> Seed:
    """A sparse initializer, and a constant of one."""
    values = onh.from_array(np.array([1.5, -2.0], np.float32), "w")
    places = onh.from_array(np.array([1, 6], np.int64), "w_indices")
    sparse = oh.make_sparse_tensor(values, places, [4, 2])
    nodes = [oh.make_node("MatMul", ["x", "w"], ["y"])]
    value = oh.make_tensor_value_info
    graph = oh.make_graph(
        nodes,
        "g",
        [value("x", 1, ["B", 4])],
        [value("y", 1, ["B", 2])],
        sparse_initializer=[sparse],
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 18)], ir_version=9)
    return Seed("sparse", model.SerializeToString())


def _narrow() -> Seed:
    """Four bits, eight-bit floats, bfloat16, strings."""
    tensor = oh.make_tensor
    kinds = onnx.TensorProto
    held = [
        tensor("w4", kinds.INT4, [4, 2], np.arange(-4, 4)),
        tensor("w8", kinds.FLOAT8E4M3FN, [4, 2], np.arange(8, dtype=np.float32)),
        tensor("wb", kinds.BFLOAT16, [2], np.array([1.0, 2.0], np.float32)),
        tensor("names", kinds.STRING, [2], [b"one", b"two"]),
        onh.from_array(np.float32(0.1), "s"),
    ]
    nodes = [
        oh.make_node("DequantizeLinear", ["w4", "s"], ["a"]),
        oh.make_node("DequantizeLinear", ["w8", "s"], ["b"]),
        oh.make_node("MatMul", ["x", "a"], ["m"]),
        oh.make_node("MatMul", ["x", "b"], ["n"]),
        oh.make_node("Add", ["m", "n"], ["p"]),
        oh.make_node("Cast", ["wb"], ["c"], to=kinds.FLOAT),
        oh.make_node("Add", ["p", "c"], ["y"]),
        oh.make_node("Identity", ["names"], ["t"]),
    ]
    value = oh.make_tensor_value_info
    graph = oh.make_graph(
        nodes,
        "g",
        [value("x", 1, ["B", 4])],
        [value("y", 1, ["B", 2]), value("t", kinds.STRING, [2])],
        held,
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10)
    return Seed("narrow types", model.SerializeToString())


def _scattered() -> Seed:
    """External data in several files, in a branch and in an attribute."""
    model = onnx.parser.parse_model(_TEXTS["branches"])
    files = {}
    graph = model.graph
    branch = graph.node[1].attribute[0].g
    for number, tensor in enumerate([graph.initializer[0], branch.initializer[0]]):
        files[f"part{number}.bin"] = b"\0" * 8 + tensor.raw_data + b"\0" * 4
        _point(tensor, f"part{number}.bin", 8)
    constant = graph.node.add(op_type="Constant", output=["k2"])
    array = np.arange(4, dtype=np.float32)
    held = onh.from_array(array, "k2")
    files["attribute.bin"] = held.raw_data
    _point(held, "attribute.bin", 0)
    constant.attribute.append(onnx.AttributeProto(name="value", type="TENSOR", t=held))
    graph.node.add(op_type="Add", input=["w", "k2"], output=["w2"])
    graph.output.add().CopyFrom(graph.output[1])
    graph.output[2].name = "w2"
    return Seed("scattered", model.SerializeToString(), files)


def _point(tensor: onnx.TensorProto, location: str, offset: int) -> None:
    length = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
