"""Engines of TensorRT for RTX, really built, on a machine without a GPU too."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import pytest
from conftest import Outcome, token_samples
from rtx_attention import case

from optimizer.engine_job import EngineOptions, build_file
from optimizer.engines.child import run_build
from optimizer.engines.cuda import Driver
from optimizer.engines.plan import read_plan
from optimizer.engines.request import BuildRequest
from optimizer.errors import EngineError, ExportError, MissingDependencyError
from optimizer.legalize import legalize
from optimizer.listener import Silent
from optimizer.model_io import save_model

pytestmark = [
    pytest.mark.tensorrt,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx") is None,
        reason="TensorRT for RTX is not installed: pip install tensorrt-rtx",
    ),
]


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    save_model(models.build(), tmp_path / "m.onnx")
    np.savez(tmp_path / "m.calibration.npz", **token_samples())
    return tmp_path / "m.onnx"


@pytest.mark.parametrize(
    ("passes", "kinds", "capability"),
    [
        ("", {"float"}, 89),
        ("fp16", {"half"}, 75),
        ("bf16", {"bf16"}, 80),
        ("outliertune", {"int8", "float"}, 120),
        ("outliertune,fp16", {"int8", "half"}, 86),
    ],
)
def test_every_precision(command, decoder, tmp_path, passes, kinds, capability):
    words = ["build", decoder, "--compute-capability", capability]
    found = command(*words, *(["--passes", passes] if passes else []))
    assert found.code == 0, found.err
    manifest = json.loads((tmp_path / "m.engine.manifest.json").read_text())
    assert kinds <= set(manifest["precisions"])
    assert manifest["compute_capabilities"] == [capability]
    plan = read_plan(tmp_path / "m.engine")
    assert plan.flavour == "tensorrt-rtx"
    assert plan.version == manifest["version"]
    assert plan.capabilities == (capability,)
    assert not plan.later


#: Builds without the permission that our own builds give, as NVIDIA's command does.
WITHOUT_PERMISSION = """
import json, sys
from optimizer.engines import build
from optimizer.engines.profiles import make_profiles
from optimizer.engines.request import BuildRequest
import onnx_ir as ir

build._allow_decomposed_attention = lambda trt, network: 0
model, output = sys.argv[1:]
profiles = make_profiles(ir.load(model).graph.inputs)
build.build(BuildRequest("tensorrt-rtx", model, output, profiles, (89,)), lambda event: None)
"""


@pytest.mark.parametrize(
    "name",
    ["16 bits", "16 bits, causal and masked", "heads of 8", "16 bits, widened",
     "values of another size", "the same keys twice, by heads", "queries that are keys"],
)  # fmt: skip
def test_attention_that_would_end_the_process_or_has_no_kernel_builds(name, tmp_path):
    model = case(name)
    legalize(model, "tensorrt-rtx")
    path = tmp_path / "m.onnx"
    save_model(model, path)
    words = [sys.executable, "-c", WITHOUT_PERMISSION, str(path), str(tmp_path / "x")]
    found = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert read_plan(tmp_path / "x").flavour == "tensorrt-rtx"


@pytest.mark.parametrize("passes", [(), ("--passes", "outliertune,fp16")])
def test_two_builds_are_the_same_bytes(command, decoder, tmp_path, passes):
    for name in ("a", "b"):
        assert command("build", decoder, *passes, "-o", tmp_path / f"{name}.engine").code == 0
    first, second = ((tmp_path / f"{name}.engine").read_bytes() for name in "ab")
    assert first == second


def test_a_model_with_a_cache_and_two_profiles(command, tmp_path):
    save_model(models.build(kv_cache=True), tmp_path / "m.onnx")
    found = command(
        "build", tmp_path / "m.onnx", "--shapes", "input_ids:1x1,1x16,1x64",
        "--shapes", "input_ids:4x1", "--compute-capability", 89,
    )  # fmt: skip
    assert found.code == 0, found.err
    manifest = json.loads((tmp_path / "m.engine.manifest.json").read_text())
    assert len(manifest["profiles"]) == 2


def test_float32_on_turing_is_refused_by_name(command, decoder, tmp_path):
    found = command("build", decoder, "--compute-capability", 75)
    assert found.code == 7
    assert "FP32 GEMM is not supported" in found.err
    assert "TensorRT built no engine at '" in found.err
    assert not (tmp_path / "m.engine").exists()


def small(nodes: list[onnx.NodeProto], path: Path, domain: str = "acme") -> Path:
    value = oh.make_tensor_value_info
    graph = oh.make_graph(
        nodes,
        "g",
        [value("x", onnx.TensorProto.FLOAT, [2, 3])],
        [value("y", onnx.TensorProto.FLOAT, [2, 3])],
        [onh.from_array(np.ones((1, 3), np.float32), "w")],
    )
    imports = [oh.make_opsetid("", 18), oh.make_opsetid(domain, 1)]
    onnx.save(oh.make_model(graph, opset_imports=imports), path)
    return path


def test_a_plugin_that_is_not_registered(tmp_path):
    path = small([oh.make_node("Turn", ["x"], ["y"], name="turn", domain="acme")], tmp_path / "c")
    custom = (("turn", "acme", "Turn"),)
    request = BuildRequest("tensorrt-rtx", str(path), str(tmp_path / "x"), custom=custom)
    with pytest.raises(EngineError, match="node 'turn': no plugin creates acme::Turn") as error:
        run_build(request, Silent())
    assert "ROIAlign_TRT" in str(error.value)


def test_a_library_that_is_none(tmp_path, run_file):
    path = small([oh.make_node("Add", ["x", "w"], ["y"])], tmp_path / "c.onnx")
    wrong = tmp_path / "lib.so"
    wrong.write_text("no library")
    assert "it does not start as one" in run_file(path, plugins=(str(wrong),))


def test_a_full_disk(tmp_path, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    path = small([oh.make_node("Add", ["x", "w"], ["y"])], tmp_path / "c.onnx")
    with pytest.raises(ExportError, match="No space left on device; make room"):
        run_build(BuildRequest("tensorrt-rtx", str(path), "/dev/full"), Silent())


@pytest.fixture
def run_file(tmp_path: Path) -> Callable[..., str]:
    """Build a file as it is and give the refusal."""

    def run(path: Path, plugins: tuple[str, ...] = ()) -> str:
        options = EngineOptions(tmp_path / "x.engine", plugins=tuple(map(Path, plugins)))
        with pytest.raises(EngineError) as error:
            build_file(path, "tensorrt-rtx", options)
        assert not (tmp_path / "x.engine").exists()
        return str(error.value)

    return run


def test_inspect_tells_what_it_needs(command: Callable[..., Outcome], decoder, tmp_path):
    assert command("build", decoder, "--compute-capability", 89).code == 0
    engine = tmp_path / "m.engine"
    with_manifest = command("inspect", engine)
    assert with_manifest.code == 0
    assert "needs tensorrt-rtx 1." in with_manifest.out
    assert "a GPU of 89" in with_manifest.out
    other = tmp_path / "other.engine"
    other.write_bytes(engine.read_bytes())
    assert "a GPU of 89;" in command("inspect", other).out, "the plan tells it too"
    (tmp_path / "other.engine.manifest.json").write_text("{}")
    assert "is no manifest of an engine" in command("inspect", other).err
    content = bytearray(engine.read_bytes())
    content[-1] ^= 1
    engine.write_bytes(content)
    changed = command("inspect", engine)
    assert changed.code == 7
    assert "is not the engine that" in changed.err
    engine.write_bytes(content[:500])
    assert "the engine is damaged" in command("inspect", engine).err


def test_an_engine_for_all_gpus_says_so(tmp_path):
    """Without any compute capability named, which this program never does, later ones too."""
    path = small([oh.make_node("Add", ["x", "w"], ["y"])], tmp_path / "c.onnx")
    run_build(BuildRequest("tensorrt-rtx", str(path), str(tmp_path / "x.engine")), Silent())
    plan = read_plan(tmp_path / "x.engine")
    assert plan.capabilities == (80, 86, 89, 120, 121)
    assert plan.later


def test_without_a_gpu_it_cannot_be_run(command, tmp_path):
    try:
        Driver()
    except MissingDependencyError:
        pass
    else:
        pytest.skip("there is a GPU here")
    path = small([oh.make_node("Add", ["x", "w"], ["y"])], tmp_path / "m.onnx")
    made = command("build", path, "--compute-capability", 86, "--compute-capability", 89)
    assert made.code == 0, made.err
    line = "engine not run: no GPU here: there is no NVIDIA driver here (libcuda.so.1 is not found)"
    assert line in made.out.splitlines()
    for words in (("check", path, tmp_path / "m.engine"), ("bench", tmp_path / "m.engine")):
        found = command(*words)
        assert found.code == 6
        assert len(found.lines) == 1
        assert "m.engine: cannot be run here: there is no NVIDIA driver here" in found.err


#: In a process of its own: the library is told that there is a GPU where there is none.
PRETEND = """
import sys
from played_cuda import PlayedDriver
from optimizer.cli import run_command
from optimizer.engines import cuda

cuda.load_library = lambda: PlayedDriver(sys.argv[1])
raise SystemExit(run_command(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("capability", "change", "says"),
    [
        ("8.9", None, "TensorRT for RTX 1.7.1.116 does not load this engine: "),
        ("8.6", None, "needs a GPU of 89, here is Played GPU (8.6); build it for this GPU (--comp"),
        ("8.9", (200, 0xFF), "is not the engine that m.engine.manifest.json describes"),
        ("8.9", (26, 9), "is not the engine that m.engine.manifest.json describes"),
    ],
)
def test_the_real_library_refuses_in_one_line(command, tmp_path, capability, change, says):
    """It has no driver here, and says so when an engine is loaded."""
    path = small([oh.make_node("Add", ["x", "w"], ["y"])], tmp_path / "m.onnx")
    assert command("build", path, "--compute-capability", 89).code == 0
    engine = tmp_path / "m.engine"
    if change is not None:
        content = bytearray(engine.read_bytes())
        content[change[0]] = change[1]
        engine.write_bytes(content)
    found = played_gpu(capability, "check", path, engine)
    assert found.returncode == 7
    assert len(found.stderr.splitlines()) == 1
    assert says in found.stderr


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (130, "the engine is damaged, or of another version than TensorRT for RTX 1.7.1.116: "),
        (25, "TensorRT for RTX 1.9.1.116 built this engine, 1.7.1.116 is installed here"),
    ],
)
def test_a_plan_without_manifest_that_was_changed(command, tmp_path, place, says):
    path = small([oh.make_node("Add", ["x", "w"], ["y"])], tmp_path / "m.onnx")
    assert command("build", path, "--compute-capability", 89).code == 0
    content = bytearray((tmp_path / "m.engine").read_bytes())
    content[place : place + 1] = b"\x09"
    content[64:120] = bytes(56) if place > 64 else content[64:120]
    (tmp_path / "n.engine").write_bytes(content)
    found = played_gpu("8.9", "check", path, tmp_path / "n.engine")
    assert found.returncode == 7
    assert len(found.stderr.splitlines()) == 1
    assert says in found.stderr


def played_gpu(capability: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRETEND, capability, *map(str, words)],
        capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def test_the_library_has_every_name_that_a_run_uses():
    """In a process of its own, as it is never loaded in this one."""
    code = """
from optimizer.engines.flavours import FLAVOURS
from optimizer.engines.library import import_tensorrt
trt = import_tensorrt(FLAVOURS["tensorrt-rtx"])
for kind, names in {
    "Runtime": "deserialize_cuda_engine engine_host_code_allowed",
    "ICudaEngine": "num_io_tensors get_tensor_name get_tensor_mode get_tensor_dtype "
    "get_tensor_shape get_tensor_location num_optimization_profiles get_tensor_profile_shape "
    "create_execution_context create_runtime_config",
    "IExecutionContext": "set_optimization_profile_async set_input_shape infer_shapes "
    "set_tensor_address get_tensor_shape set_output_allocator execute_async_v3",
    "IRuntimeConfig": "dynamic_shapes_kernel_specialization_strategy",
    "DynamicShapesKernelSpecializationStrategy": "EAGER",
    "TensorIOMode": "INPUT", "TensorLocation": "HOST", "IOutputAllocator": "",
}.items():
    missing = [name for name in names.split() if not hasattr(getattr(trt, kind), name)]
    assert not missing, (kind, missing)
"""
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=path)
    assert run.returncode == 0, run.stderr
