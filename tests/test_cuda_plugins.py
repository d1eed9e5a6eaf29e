"""CUDA kernels and the TensorRT plugin without a GPU: they compile, and the plugin does its part.

Needs nvcc; the plugin also TensorRT's headers (TENSORRT_INCLUDE_DIR, or where CMake finds them),
and engines TensorRT for RTX (``pip install optimize-onnx[tensorrt-rtx]``).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import engines
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import rule_case
from onnx import TensorProto, helper, numpy_helper

from optimizer import graph as graphs
from optimizer.custom_ops import library as custom_library
from optimizer.custom_ops.bodies import left_out
from optimizer.custom_ops.cuda_layout import most_values, pack_cuda
from optimizer.custom_ops.declaration import DOMAIN, OP_TYPE, declaration_hash
from optimizer.engine_job import EngineOptions, build_file
from optimizer.engines import library_path
from optimizer.errors import EngineError
from optimizer.hashing import hash_file
from optimizer.pass_base import Context
from passes.fp16 import Fp16
from passes.sparse_matmul import Options, SparseMatMul

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc on the PATH")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the adapters, built with warnings as errors."""
    if shutil.which("cmake") is None:
        pytest.skip("there is no cmake on the PATH")
    folder = tmp_path_factory.mktemp("plugin")
    configure = [
        "cmake", "-S", str(ROOT / "plugins"), "-B", str(folder), "-DOPTIMIZE_WERROR=ON",
        "-DOPTIMIZE_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=80-real",
    ]  # fmt: skip
    if headers := os.environ.get("TENSORRT_INCLUDE_DIR"):
        configure.append(f"-DTENSORRT_INCLUDE_DIR={headers}")
    run = subprocess.run(configure, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    targets = ["optimize_ops_cuda"]
    if "TensorRT plugin: off" not in run.stdout:
        targets += ["optimize_tensorrt", "mini_host"]
    build = ["cmake", "--build", str(folder), "-j2", "--target", *targets]
    run = subprocess.run(build, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder / "sparse_matmul"


@pytest.fixture(scope="module")
def built(libraries: Path) -> Path:
    """Folder of the TensorRT plugin and its mini-host."""
    folder = libraries / "tensorrt"
    if not (folder / "mini_host").is_file():
        pytest.skip("no NvInferRuntime.h; give its folder as TENSORRT_INCLUDE_DIR")
    return folder


@pytest.mark.native
@needs_nvcc
def test_onnx_runtime_takes_the_cuda_library_and_the_body_runs_without_a_gpu(libraries):
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(libraries / "ort_cuda" / "liboptimize_ops_cuda.so"))
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("there is CUDA: benchmarks/gpu.py runs the kernels")
    proto = model(layout="mma16")
    with pytest.raises(Exception, match="SparseMatMul"):  # no provider here has a kernel
        ort.InferenceSession(proto.SerializeToString(), options)


@pytest.mark.tensorrt
@needs_nvcc
def test_plugin_exports_what_tensorrt_looks_for_and_nothing_else(built):
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("there is no nm on the PATH")
    command = [tool, "-D", "--defined-only", str(built / "liboptimize_tensorrt.so")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {line.split()[-1] for line in run.stdout.splitlines()} == {
        "setLoggerFinder",
        "getCreators",
    }


@pytest.mark.tensorrt
@needs_nvcc
def test_an_installation_has_the_plugin_where_it_is_looked_for(built, tmp_path, monkeypatch):
    install = ["cmake", "--install", built.parent.parent, "--component", "tensorrt"]
    subprocess.run([*install, "--prefix", tmp_path], check=True, capture_output=True)
    native = tmp_path / "optimizer" / "native"
    monkeypatch.delenv(library_path.VARIABLE, raising=False)
    monkeypatch.setattr(custom_library, "_FOLDER", native)
    assert library_path.find_plugins((), {DOMAIN}) == (native / "liboptimize_tensorrt.so",)


@pytest.mark.native
@needs_nvcc
def test_a_build_that_must_have_the_plugin_fails_without_headers(tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("there is no cmake on the PATH")
    configure = [
        "cmake", "-S", ROOT / "plugins", "-B", tmp_path, "-DOPTIMIZE_CUDA=ON",
        "-DOPTIMIZE_TENSORRT=ON", "-DTENSORRT_INCLUDE_DIR=TENSORRT_INCLUDE_DIR-NOTFOUND",
        "-DCMAKE_FIND_ROOT_PATH=/nowhere", "-DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "TENSORRT_INCLUDE_DIR"}
    run = subprocess.run(configure, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode != 0
    assert "NvInferRuntime.h was not found: give its folder" in " ".join(run.stderr.split())


@pytest.mark.tensorrt
@needs_nvcc
def test_mini_host_walks_through_the_plugin(built):
    command = [str(built / "mini_host"), str(built / "liboptimize_tensorrt.so")]
    run = subprocess.run(
        [*command, str(declaration_hash())], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "ok: the round trip keeps every field" in run.stdout
    assert "ok: enqueue" in run.stdout or "no GPU: enqueue was not run" in run.stdout
    other = subprocess.run(
        [*command, str(declaration_hash() + 1)], capture_output=True, text=True, check=False
    )
    assert other.returncode == 1
    assert "rebuild the plugin library" in other.stderr


def model(**changes: object) -> onnx.ModelProto:
    """One layer in float16, [batch, 7, 200] to [batch, 7, 130]."""
    rng = np.random.default_rng(0)
    k, n = 200, 130
    weight = rng.standard_normal((k, n)).astype(np.float16)
    weight[rng.random((k, n)) < 0.7] = 0
    packed = pack_cuda(weight, "mma16")
    arrays = {
        "bitmap": packed.bitmap,
        "values": packed.values,
        "offsets": packed.offsets,
        "bias": np.zeros(n, np.float16),
    }
    attributes = {
        "K": k, "N": n, "layout": "mma16", "activation": "gelu", "num_inputs": 5,
        "most_values": most_values(packed),
        "declaration": declaration_hash(),
    }  # fmt: skip
    for name, value in changes.items():
        (arrays if name in arrays else attributes)[name] = value
    node = helper.make_node(OP_TYPE, ["x", *arrays], ["y"], domain=DOMAIN, name="l", **attributes)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", 7, size])
        for name, size in (("x", k), ("y", n))
    ]
    initializers = [numpy_helper.from_array(a, name) for name, a in arrays.items()]
    graph = helper.make_graph([node], "layer", ends[:1], ends[1:], initializers)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


#: In a process of its own, since TensorRT aborts on some mistakes.
BUILD = """
import hashlib, pathlib, sys

root, model, plugin = sys.argv[1:]
sys.path[:0] = [root]
from optimizer.engines.flavours import flavour_of
from optimizer.engines.library import import_tensorrt
trt = import_tensorrt(flavour_of("tensorrt-rtx"))

logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
trt.get_plugin_registry().load_library(plugin)

def engine():
    network = builder.create_network(0)
    network.name = "layer"  # else the network's number in this process becomes part of the engine
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(pathlib.Path(model).read_bytes()):
        return None
    kinds = {network.get_layer(i).type for i in range(network.num_layers)}
    assert trt.LayerType.PLUGIN_V3 in kinds
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 7, 200), (2, 7, 200), (4, 7, 200))
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config)

made = engine()
print("engine", "none" if made is None else hashlib.sha256(bytes(made)).hexdigest())
if made is not None:
    print("engine", hashlib.sha256(bytes(engine())).hexdigest())
"""


def build_engine(proto: onnx.ModelProto, built: Path, folder: Path) -> tuple[list[str], str]:
    """Digests of two engines, or "none"; and what was logged."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT for RTX is not installed: pip install tensorrt-rtx")
    onnx.save(proto, folder / "model.onnx")
    plugin = built / "liboptimize_tensorrt.so"
    run = subprocess.run(
        [sys.executable, "-c", BUILD, ROOT, "model.onnx", plugin],
        capture_output=True, text=True, check=False, cwd=folder,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    digests = [line.split()[1] for line in run.stdout.splitlines() if line.startswith("engine ")]
    return digests, run.stdout + run.stderr


@pytest.mark.tensorrt
@needs_nvcc
def test_the_command_line_s_build_loads_the_plugin_once_and_counts_its_layers(built, tmp_path):
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT for RTX is not installed: pip install tensorrt-rtx")
    onnx.save(model(), tmp_path / "model.onnx")
    library = built / "liboptimize_tensorrt.so"
    digests = []
    for name in ("a", "b"):
        options = EngineOptions(
            tmp_path / f"{name}.engine", capabilities=(80,), plugins=(library, library)
        )
        made = build_file(tmp_path / "model.onnx", "tensorrt-rtx", options)
        digests.append(made.manifest["engine"]["sha256"])
    assert digests[0] == digests[1]
    assert made.manifest["plugin_layers"] == 1
    (loaded,) = made.manifest["plugins"]
    assert loaded["file"] == library.name
    assert loaded["sha256"] == hash_file(library)
    assert any(OP_TYPE in creator for creator in loaded["creators"])
    onnx.save(model(declaration=1), tmp_path / "other.onnx")
    for file, libraries, said in (
        ("model", (), f"node 'l': no plugin creates {DOMAIN}::{OP_TYPE}"),
        ("other", (library,), "rebuild the plugin library"),
    ):
        options = EngineOptions(tmp_path / "c.engine", capabilities=(80,), plugins=libraries)
        with pytest.raises(EngineError, match=said):
            build_file(tmp_path / f"{file}.onnx", "tensorrt-rtx", options)


@pytest.mark.tensorrt
@needs_nvcc
def test_engine_holds_the_plugin_and_is_deterministic(built, tmp_path):
    digests, log = build_engine(model(), built, tmp_path)
    assert len(digests) == 2, log
    assert digests[0] == digests[1] != "none"


@pytest.mark.tensorrt
@needs_nvcc
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_the_passes_write_becomes_an_engine(built, tmp_path, precision):
    pruned = rule_case.graph(
        "m = MatMul(x, w)  a = Add(m, b)  y = Relu(a)",
        inputs="float[B,7,200] x, float[200,130] w, float[130] b",
        output="float[B,7,130] y",
    )
    rng = np.random.default_rng(0)
    w = rng.standard_normal((200, 130)) * (rng.random((200, 130)) < 0.3)
    for value, array in zip(pruned.graph.inputs[1:], (w, np.ones(130)), strict=True):
        constant = graphs.add_initializer(pruned.graph, f"{value.name}0", array.astype("float32"))
        value.replace_all_uses_with(constant)
        pruned.graph.inputs.remove(value)
    Fp16().call(pruned, Context(target="tensorrt-rtx"))
    options = Options(force=True, precision=precision)
    assert SparseMatMul(options).call(pruned, Context(target="tensorrt-rtx")).applied == 1
    with left_out(pruned):
        proto = ir.to_proto(pruned)
    digests, log = build_engine(proto, built, tmp_path)
    assert len(digests) == 2, log
    assert digests[0] == digests[1] != "none"


@pytest.mark.tensorrt
@needs_nvcc
def test_a_family_with_sparse_layers_becomes_an_engine(built, monkeypatch):
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT for RTX is not installed: pip install tensorrt-rtx")
    monkeypatch.setenv("OPTIMIZE_TENSORRT_LIBRARY", str(built / "liboptimize_tensorrt.so"))
    row = engines.build("llama", True, engines.SPARSE)
    assert row["outcome"] == "built", row["detail"]
    # Seven in each of two layers, and the head, which force=true replaces though it is not pruned.
    assert row["plugin_layers"] == 15


@pytest.mark.tensorrt
@needs_nvcc
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"declaration": 1}, "rebuild the plugin library"),
        ({"layout": "n64k1"}, "has no CUDA kernel"),
        ({"offsets": np.zeros(3, np.int32)}, "input 3 has the shape [3], expected [13]"),
        ({"bitmap": np.zeros((12, 512), np.int32)}, ""),
    ],
)
def test_bad_models_give_no_engine_and_a_reason(built, tmp_path, changes, said):
    digests, log = build_engine(model(**changes), built, tmp_path)
    assert digests == ["none"], log
    assert said in log
