"""The operator SparseMatMul: declaration, packing, body, library, and what damaged models get."""

from __future__ import annotations

import native_library
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from optimizer.custom_ops import library
from optimizer.custom_ops.declaration import (
    ACTIVATIONS,
    INPUTS,
    LAYOUTS,
    body,
    declaration_hash,
)
from optimizer.custom_ops.header import header
from optimizer.custom_ops.packing import Packed, pack, packed_bytes, unpack
from optimizer.errors import MissingDependencyError

#: With kernels for the CPU.
FORMS = [
    ("n64k1", 4), ("n64k1", 5), ("n16k4", 6), ("n16k4", 7),
]  # fmt: skip


def case(layout, inputs, activation="none", shape=(70, 100), density=0.3, seed=0):
    """The arrays of a node by name, and the dense weight [K, N]."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape, dtype=np.float32) * (rng.random(shape) < density)
    scale = np.ones(shape[1], np.float32)
    if LAYOUTS[layout].int8:
        scale = (np.maximum(np.abs(weight).max(axis=0), 1e-6) / 127).astype(np.float32)
        weight = np.rint(weight / scale).astype(np.int8)
    packed = pack(weight, layout)
    arrays = {
        "bitmap": packed.bitmap,
        "values": packed.values,
        "offsets": packed.offsets,
        "bias": rng.standard_normal(shape[1], dtype=np.float32),
        "scale": scale,
        "x_scale": np.array([0.03], np.float32),
    }
    return {name: arrays[name] for name in INPUTS[1:inputs]}, weight * scale


def model(layout, arrays, activation="none", shape=(70, 100), function=True, changes=None):
    inputs = len(arrays) + 1
    form = body(layout, activation, inputs)
    attributes = {
        "K": shape[0],
        "N": shape[1],
        "layout": layout,
        "activation": activation,
        "num_inputs": inputs,
        "most_values": 0,
        "declaration": declaration_hash(),
        **(changes or {}),
    }
    node = helper.make_node(
        "SparseMatMul", ["x", *arrays], ["y"], domain="optimize", overload=form.overload,
        **attributes,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "s", None])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("optimize", 1)]
    made = helper.make_model(graph, opset_imports=imports, ir_version=10)
    if function:
        made.functions.append(ir.to_proto(form))
    return made


def session(proto, registered):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if registered:
        options.register_custom_ops_library(str(native_library.path()))
    return ort.InferenceSession(proto.SerializeToString(), options)


def test_header_is_the_declarations():
    text = (native_library.ROOT / "plugins/sparse_matmul/declaration.h").read_text("utf-8")
    assert text == header()


@given(
    k=st.integers(1, 140),
    n=st.integers(1, 140),
    density=st.sampled_from([0, 0.02, 0.3, 1]),
    layout=st.sampled_from(list(LAYOUTS)),
)
@settings(max_examples=40, deadline=None)
def test_packing_is_lossless(k, n, density, layout):
    rng = np.random.default_rng(k * n)
    weight = rng.integers(1, 100, (k, n)).astype(np.int8) * (rng.random((k, n)) < density)
    packed = pack(weight.astype(np.int8), layout)
    assert packed.nbytes == packed_bytes(k, n, int((weight != 0).sum()), 1)
    np.testing.assert_array_equal(unpack(packed, layout, k, n), weight)


def test_unpacking_refuses_contradictions():
    packed = pack(np.eye(70, dtype=np.float32), "n64k1")
    with pytest.raises(ValueError, match="tile 0 has 64 set bits"):
        unpack(Packed(packed.bitmap, packed.values, packed.offsets - 1), "n64k1", 70, 70)
    with pytest.raises(ValueError, match="has 2 tiles"):
        unpack(packed, "n64k1", 70, 20)
    with pytest.raises(ValueError, match="set bits outside"):
        unpack(packed, "n64k1", 70, 66)


@pytest.mark.parametrize(("layout", "inputs"), [*FORMS, ("mma16", 4), ("mma16", 5), ("mma8", 7)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_body_is_what_it_says(layout, inputs, activation):
    arrays, weight = case(layout, inputs)
    proto = model(layout, arrays, activation)
    onnx.checker.check_model(proto)
    x = np.random.default_rng(1).standard_normal((2, 3, 70), dtype=np.float32)
    ours = session(proto, registered=False)
    found = ours.run(None, {"x": x})[0]
    step = arrays.get("x_scale", np.abs(x).max(axis=-1, keepdims=True) / 127)
    rounded = x if not LAYOUTS[layout].int8 else np.clip(np.rint(x / step), -128, 127) * step
    wanted = rounded.astype(np.float64) @ weight + arrays.get("bias", 0)
    if activation == "none":  # the others are operators of the standard
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert found.shape == (2, 3, 100)


@pytest.mark.native
@pytest.mark.parametrize(("layout", "inputs"), FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernel_equals_body(layout, inputs, activation):
    arrays, _ = case(layout, inputs)
    x = np.random.default_rng(1).standard_normal((2, 3, 70), dtype=np.float32)
    proto = model(layout, arrays, activation)
    body_says = session(proto, registered=False).run(None, {"x": x})[0]
    made = session(proto, registered=True)
    kernel_says = made.run(None, {"x": x})[0]
    if LAYOUTS[layout].int8 and activation in ("none", "relu"):
        # so that what was verified with one of them holds for the other, however deep the model
        np.testing.assert_array_equal(kernel_says, body_says)
    # sums of at most 70 products in another order; other polynomials for the activations
    np.testing.assert_allclose(kernel_says, body_says, rtol=1e-5, atol=2e-5)
    alone = session(model(layout, arrays, activation, function=False), registered=True)
    np.testing.assert_array_equal(alone.run(None, {"x": x})[0], kernel_says)
    assert made.run(None, {"x": x[:0]})[0].shape == (0, 3, 100)


@pytest.mark.native
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"declaration": 5}, "another declaration"),
        ({"layout": "mma16"}, "none of the CPU's"),
        ({"activation": "swish"}, "unknown activation 'swish'"),
        ({"K": 200}, "bytes of the bitmap"),
        ({"K": 69}, "set bits outside of K x N"),
        ({"N": 0}, "K and N must be between"),
    ],
)
def test_attributes_that_do_not_fit_are_refused(changes, says):
    arrays, _ = case("n64k1", 4, density=0.9)
    with pytest.raises(Exception, match=says):
        session(model("n64k1", arrays, function=False, changes=changes), registered=True)


@pytest.mark.native
def test_damaged_initializers_are_refused():
    arrays, _ = case("n16k4", 6)
    damages = {
        "offsets": (arrays["offsets"] + 1, "is damaged: tile"),
        "values": (arrays["values"][:-9], "is damaged: tile"),
        "bitmap": (~arrays["bitmap"], "is damaged: tile"),
        "scale": (-arrays["scale"], "negative or not finite"),
        "bias": (arrays["bias"][:7], "has 7 elements, expected 100"),
    }
    for name, (array, says) in damages.items():
        with pytest.raises(Exception, match=says):
            session(model("n16k4", {**arrays, name: array}, function=False), registered=True)
    wrong = {**arrays, "values": arrays["values"].astype(np.float32)}
    with pytest.raises(Exception, match=r"'values' has element type 1, expected 3"):
        session(model("n16k4", wrong, function=False), registered=True)


@pytest.mark.native
def test_input_of_another_width_is_refused():
    arrays, _ = case("n64k1", 4)
    made = session(model("n64k1", arrays, function=False), registered=True)
    with pytest.raises(Exception, match="last dimension of x is 71, expected K = 70"):
        made.run(None, {"x": np.zeros((1, 1, 71), np.float32)})


def test_missing_library_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv(library.VARIABLE, str(tmp_path / "none.so"))
    library._checked.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"reinstall.*body in standard operators"):
        library.library_path()
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setenv(library.VARIABLE, str(broken))
    with pytest.raises(MissingDependencyError, match="cannot be loaded"):
        library.library_path()


@pytest.mark.native
def test_library_of_another_declaration_is_refused(monkeypatch):
    built = native_library.path()
    monkeypatch.setenv(library.VARIABLE, str(built))
    library._checked.cache_clear()
    monkeypatch.setattr(library, "declaration_hash", lambda: 7)
    with pytest.raises(MissingDependencyError, match=r"another declaration .* rebuild"):
        library.library_path()
    library._checked.cache_clear()
