"""The bundle for Jetson: what is written and refused, and its command with a played TensorRT."""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import models
import numpy as np
import onnx
import onnx_ir as ir
import outlier_cases
import played_tensorrt
import pytest
import rule_case

from optimizer import graph as graphs
from optimizer.custom_ops.declaration import OP_TYPE
from optimizer.errors import (
    CalibrationError,
    ExportError,
    MissingDependencyError,
    OptionError,
    UnsupportedError,
)
from optimizer.export import bundle, bundle_samples
from optimizer.export.bundle import SCRIPTS, write_bundle
from optimizer.export.support import check_supported
from optimizer.legalize import legalize
from optimizer.pass_base import Context
from passes.fp16 import Fp16
from passes.outliertune import OutlierTune
from passes.sparse_matmul import Options, SparseMatMul

PROFILES = ({"x": ((1, 3, 64), (2, 3, 64), (4, 3, 64))},)
X = np.random.default_rng(0).standard_normal((2, 3, 64)).astype(np.float32)


def dense() -> ir.Model:
    """y = relu(x w), x [B, 3, 64]."""
    w = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)
    w[np.random.default_rng(2).random((64, 64)) < 0.7] = 0
    model = rule_case.graph(
        "m = MatMul(x, w)  y = Relu(m)",
        inputs="float[B,3,64] x, float[64,64] w",
        output="float[B,3,64] y",
        opset=20,
    )
    constant = graphs.add_initializer(model.graph, "w0", w)
    model.graph.inputs[1].replace_all_uses_with(constant)
    model.graph.inputs.pop()
    return model


def sparse() -> ir.Model:
    """The same as the operator, in float16."""
    model = dense()
    model.graph.opset_imports[""] = 23
    Fp16().call(model, Context(target="jetson"))
    report = SparseMatMul(Options(force=True, precision="fp32")).call(
        model, Context(target="jetson")
    )
    assert report.applied == 1
    legalize(model, "jetson")
    return model


def expected(model: ir.Model) -> dict[str, np.ndarray]:
    w = graphs.const(model.graph.initializers["w0"])
    return {"y": np.maximum(X @ w, 0)}


def written(folder: Path, model: ir.Model | None = None, **options: Any) -> Path:
    model = model or dense()
    known = (
        {"samples": {"x": X}, "expected": expected(model)}
        if "w0" in (model.graph.initializers)
        else {"samples": None, "expected": None}
    )
    known |= {"profiles": PROFILES, "manifest": {"passes": ["sparsify"]}, **options}
    files = write_bundle(model, folder, **known)
    assert all(path.is_file() for path in files)
    assert files[-1] == folder / "manifest.json"
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(f".{folder.name}")] == []
    return folder


def dry_run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """In a clean interpreter: no package of this project, and none that is installed."""
    command = [sys.executable, "-I", "-S", str(folder / "build_engine.py"), "--dry-run", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


def test_bundle_of_standard_operators(tmp_path: Path) -> None:
    folder = written(tmp_path / "b")
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "README.txt", "manifest.json", "model.onnx", "model.onnx.data", "samples.npz", *SCRIPTS,
    }  # fmt: skip
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert set(manifest["files"]) == names - {"manifest.json"}
    assert manifest["source"] == {"passes": ["sparsify"]}
    assert manifest["profiles"] == [
        {"x": {"min": [1, 3, 64], "opt": [2, 3, 64], "max": [4, 3, 64]}}
    ]
    assert (manifest["tensorrt"], manifest["cuda"], manifest["jetpack"]) == ("10.3", "12.6", "6.2")
    assert not manifest["plugins"]
    onnx.checker.check_model(str(folder / "model.onnx"))
    done = dry_run(folder)
    assert done.returncode == 0, done.stderr
    assert "--minShapes=x:1x3x64" in done.stdout
    assert "--stronglyTyped" in done.stdout
    assert "7 files" in done.stdout
    with np.load(folder / "samples.npz") as stored:
        np.testing.assert_array_equal(stored["input.x"], X)


def test_bundle_with_the_plugin(tmp_path: Path) -> None:
    model = sparse()
    bodies = set(model.functions)
    folder = written(tmp_path / "b", model)
    assert set(model.functions) == bodies, "the model is as it was"
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    assert not proto.functions
    assert OP_TYPE in {node.op_type for node in proto.graph.node}
    assert proto.opset_import[0].version <= 20
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert manifest["plugins"][0]["operator"] == "optimize::SparseMatMul"
    assert all((folder / name).is_file() for name in manifest["compiled"])
    done = dry_run(folder)
    assert done.returncode == 0, done.stderr
    assert "code=sm_87" in done.stdout
    assert "--staticPlugins=" in done.stdout


#: Builds with TensorRT for RTX in place of TensorRT, whose Python API it shares as far as a bundle
#: goes.
RTX = """
import argparse, json, pathlib, sys

root, folder, library, output = sys.argv[1:]
sys.path[:0] = [root]
from optimizer.engines.flavours import flavour_of
from optimizer.engines.library import import_tensorrt
tensorrt_rtx = import_tensorrt(flavour_of("tensorrt-rtx"))
sys.path.insert(0, folder)
import engine_build

class Cuda:
    def version(self):
        return "12.6"

options = argparse.Namespace(level=3, timing_cache=output + ".cache", output=output, no_check=True)
manifest = json.loads(pathlib.Path(folder, "manifest.json").read_text())
try:
    words = folder, manifest, options, 256 << 20, library or None
    engine_build.build(tensorrt_rtx, Cuda(), *words)
except engine_build.BuildError as error:
    sys.exit(f"{error.code}: {error}")
"""


def built_with_rtx(folder: Path, library: str = "") -> tuple[bytes, str]:
    """The engine, empty where there is none, and what was said."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT for RTX is not installed: pip install tensorrt-rtx")
    output = folder.parent / "rtx.engine"
    output.unlink(missing_ok=True)
    run = subprocess.run(
        [sys.executable, "-c", RTX, Path(__file__).parent.parent, folder, library, output],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return output.read_bytes() if output.exists() else b"", run.stdout + run.stderr


@pytest.mark.tensorrt
def test_a_real_builder_makes_the_engine(tmp_path: Path) -> None:
    folder = written(tmp_path / "b")
    first, said = built_with_rtx(folder)
    assert first, said
    assert "steps)" in said, "the monitor was called"
    assert built_with_rtx(folder)[0] == first
    model = dense()
    model.graph[0].replace_input_with(1, model.graph.inputs[0])  # [B, 3, 64] x [B, 3, 64]
    made, said = built_with_rtx(written(tmp_path / "wrong", model, samples=None, expected=None))
    assert not made
    assert "7: the parser refused the model" in said
    assert "node '" in said


@pytest.mark.tensorrt
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on the PATH")
def test_sources_of_a_bundle_become_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "TENSORRT_INCLUDE_DIR" not in os.environ:
        pytest.skip("no headers of TensorRT; give their folder as TENSORRT_INCLUDE_DIR")
    folder = written(tmp_path / "b", sparse())
    script = played_tensorrt.script(folder, monkeypatch)
    library = tmp_path / "liboptimize_tensorrt.so"
    script.build_plugin(str(folder), script.read_manifest(str(folder)), str(library))
    assert [p.name for p in tmp_path.glob("*.tmp")] == []
    if tool := shutil.which("nm"):
        command = [tool, "-D", "--defined-only", str(library)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        exports = {line.split()[-1] for line in run.stdout.splitlines()}
        assert exports == {"setLoggerFinder", "getCreators"}
    made, said = built_with_rtx(folder, str(library))
    assert made, said
    (tmp_path / "empty.so").write_bytes(b"")
    made, said = built_with_rtx(folder, str(tmp_path / "empty.so"))
    assert not made
    assert "7: plugin: " in said
    assert "could not be loaded" in said


@pytest.mark.parametrize("name", ["model.onnx.data", "samples.npz", "build_engine.py"])
def test_a_changed_file_is_found(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path / "b")
    with (folder / name).open("ab") as file:
        file.write(b"\n")
    done = dry_run(folder)
    assert done.returncode == 2
    assert name in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_file_and_a_damaged_manifest_are_found(tmp_path: Path) -> None:
    folder = written(tmp_path / "b")
    (folder / "samples.npz").unlink()
    done = dry_run(folder)
    assert (done.returncode, "samples.npz" in done.stderr) == (2, True)
    for text in ("{", "[]", '{"format": 2, "files": {"model.onnx": "0"}}'):
        (folder / "manifest.json").write_text(text)
        done = dry_run(folder)
        assert done.returncode == 2
        assert "manifest.json" in done.stderr
        assert "Traceback" not in done.stderr


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    folder = written(tmp_path / "b")
    with pytest.raises(OptionError, match="--force"):
        written(folder)
    old = (folder / "model.onnx.data").read_bytes()
    model = dense()
    model.graph.initializers["w0"].const_value = ir.tensor(np.eye(64, dtype=np.float32), name="w0")
    written(folder, model, force=True)
    assert (folder / "model.onnx.data").read_bytes() != old
    assert dry_run(folder).returncode == 0
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "precious").write_text("x")
    with pytest.raises(OptionError, match="no bundle"):
        written(foreign, force=True)
    assert (foreign / "precious").read_text() == "x"
    with pytest.raises(OptionError, match="create it first"):
        written(tmp_path / "none" / "b")


@pytest.mark.parametrize("kind", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_all_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: BaseException
) -> None:
    folder = written(tmp_path / "b")
    before = (folder / "manifest.json").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise kind

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(ExportError if isinstance(kind, OSError) else KeyboardInterrupt):
        written(folder, force=True)
    assert (folder / "manifest.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize(
    ("profiles", "said"),
    [
        ((), "none were given"),
        (({"z": ((1,), (1,), (1,))},), "no input 'z'"),
        (({},), "gives no shapes of 'x'"),
        (({"x": ((1, 64), (1, 64), (1, 64))},), "shape"),
        (({"x": ((2, 3, 64), (1, 3, 64), (4, 3, 64))},), "min <= opt <= max"),
        (({"x": ((1, 3, 64), (1, 4, 64), (1, 4, 64))},), "axis 1 of 'x' is 3, found 4"),
    ],
)
def test_profiles_that_contradict_the_model(tmp_path: Path, profiles: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        written(tmp_path / "b", profiles=profiles)
    assert not (tmp_path / "b").exists()


def test_one_symbolic_size_has_one_value() -> None:
    model = rule_case.graph(
        "y = Add(x, z)", inputs="float[B,4] x, float[B,4] z", output="float[B,4] y"
    )
    one, two = ((1, 4),) * 3, ((1, 4), (2, 4), (2, 4))
    with pytest.raises(OptionError, match="'B' is 1 in 'x' and 2 in 'z'"):
        bundle_samples.check_profiles(model, [{"x": one, "z": two}])
    bundle_samples.check_profiles(model, [{"x": two, "z": two}])


def test_samples_that_do_not_fit(tmp_path: Path) -> None:
    good = expected(dense())
    for samples, outputs, error in (
        ({"x": X}, None, OptionError),
        ({"z": X}, good, CalibrationError),
        ({"x": X.astype(np.float16)}, good, CalibrationError),
        ({"x": X[:, :2]}, good, CalibrationError),
        ({"x": np.concatenate([X] * 3)}, good, CalibrationError),
    ):
        with pytest.raises(error, match="stored samples"):
            written(tmp_path / "b", samples=samples, expected=outputs)
    assert list(tmp_path.iterdir()) == []


def test_another_jetpack_and_an_installation_without_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match=r"6\.1, 6\.2"):
        written(tmp_path / "b", jetpack="5.1")
    monkeypatch.setattr(bundle, "_SOURCES", (tmp_path / "none",))
    with pytest.raises(MissingDependencyError, match="reinstall"):
        written(tmp_path / "b", sparse())
    written(tmp_path / "b")  # needs none


UNTAKEN = {
    "an operator": ("y = BitwiseNot(x)", "int32[4]", "", 20, "node '.*' \\(BitwiseNot\\)"),
    "uint8": ("y = Add(x, c)", "uint8[4]", "uint8[4] c = {1,2,3,4}", 20, "'c' is UINT8"),
    "int16": ("a = Cast<to=5>(x)  b = Add(a, c)  y = Cast<to=6>(b)", "int32[4]",
              "int16[4] c = {1,2,3,4}", 20, "'c' is INT16"),
    "a zero point": ("q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z)", "float[4]",
                     "float s = {1.0}, int8 z = {3}", 20, "zero point 'z' is not zero"),
    "no zero point": ("q = QuantizeLinear(x, s)  y = DequantizeLinear(q, s)", "float[4]",
                      "float s = {1.0}", 20, "output is UINT8"),
    "opset": ("y = Relu(x)", "float[4]", "", 21, "has opset 21"),
    "an attribute": ("y = ScatterND<reduction=\"add\">(x, i, u)", "float[4]",
                     "int64[1,1] i = {0}, float[1] u = {1.0}", 20, "reduction is add"),
    "a cast": ("a = Cast<to=5>(x)  y = Cast<to=1>(a)", "float[4]", "", 20, "casts to INT16"),
    "an output": ("y = Cast<to=5>(x)", "float[4]", "", 20, "casts to INT16"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNTAKEN)
def test_what_the_parser_does_not_take_is_refused(case: str) -> None:
    nodes, kind, constants, opset, said = UNTAKEN[case]
    output = "int16[4] y" if case == "an output" else f"{kind} y"
    model = rule_case.graph(
        nodes, inputs=f"{kind} x", output=output, constants=constants, opset=opset
    )
    said = "output 'y' is INT16" if case == "an output" else said
    with pytest.raises(UnsupportedError, match=said):
        check_supported(model)


def test_foreign_domains_and_subgraphs_are_looked_at() -> None:
    model = dense()
    model.graph[-1].domain = "acme"
    with pytest.raises(UnsupportedError, match="domain 'acme'"):
        check_supported(model)
    inner = rule_case.model(
        "g (bool c, float[4] x) => (float[4] y) {"
        " y = If (c) <then_branch = t () => (float[4] a) { a = Relu(x) },"
        " else_branch = e () => (float[4] b) { b = Compress<axis=0>(x, c) }> }",
        opset=20,
    )
    with pytest.raises(UnsupportedError, match="Compress"):
        check_supported(inner)


def test_tolerance_grows_with_depth_and_with_coarser_types() -> None:
    one, four = (
        dense(),
        rule_case.graph(
            "a = Relu(x) b = Relu(a) c = Relu(b) d = Relu(c) e = Relu(d) f = Relu(e) "
            "h = Relu(f) y = Relu(h)"
        ),
    )
    assert bundle_samples.tolerance(one) == pytest.approx(4 * 2**0.5 * 2**-11)
    assert bundle_samples.tolerance(four) == pytest.approx(2 * bundle_samples.tolerance(one))


def test_scripts_keep_to_old_pythons_and_their_library() -> None:
    known = {"tensorrt", *(name.removesuffix(".py") for name in SCRIPTS)}
    for name in SCRIPTS:
        text = (Path(bundle.__file__).parent / "jetson" / name).read_text("utf-8")
        tree = ast.parse(text, feature_version=(3, 8))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {n.split(".")[0] for n in names} <= known | sys.stdlib_module_names


@dataclass
class Device:
    """A played Jetson: ``run`` is the command in the bundle ``folder``."""

    folder: Path
    played: played_tensorrt.Played
    script: Any
    patch: pytest.MonkeyPatch
    capture: pytest.CaptureFixture[str]

    def run(self, *words: str) -> tuple[int, str, str]:
        self.patch.setitem(sys.modules, "tensorrt", self.played.module())
        code = self.script.main(words)
        said = self.capture.readouterr()
        assert list(Path().glob("*.tmp")) == []
        if code:
            assert not Path("model.engine").exists()
        return code, said.out, said.err


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler on the PATH")
    return played_tensorrt.runtime(tmp_path_factory.mktemp("cuda"), compiler)


@pytest.fixture
def device(
    tmp_path: Path,
    runtime: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Device]:
    def make(model: ir.Model | None = None) -> Device:
        folder = written(tmp_path / "b", model)
        script = played_tensorrt.script(folder, monkeypatch)
        (tmp_path / "release").write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD\n")
        (tmp_path / "meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable:    6000000 kB\n")
        monkeypatch.setattr(script, "RELEASE", str(tmp_path / "release"))
        monkeypatch.setattr(script, "MEMORY", str(tmp_path / "meminfo"))
        monkeypatch.setattr(script, "CUDART", (str(runtime),))
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        return Device(folder, played_tensorrt.Played(), script, monkeypatch, capsys)

    return make


def test_device_builds_and_checks(device: Callable[..., Device]) -> None:
    jetson = device()
    code, out, err = jetson.run("--workspace", "100")
    assert (code, err) == (0, "")
    assert "output 'y': relative L2 error" in out
    assert "Building (2 steps)" in out
    assert jetson.played.seen["shapes"] == [("x", (1, 3, 64), (2, 3, 64), (4, 3, 64))]
    assert jetson.played.seen["pools"] == {"workspace": 100 << 20, "dram": 128 << 20}
    content = json.loads(Path("model.engine.manifest.json").read_text())
    assert content["sha256"] == hashlib.sha256(Path("model.engine").read_bytes()).hexdigest()
    assert content["checked"][0]["found"] < 1e-6
    assert Path("timing.cache").read_bytes() == b"cache"
    assert jetson.played.seen["loads"] == 0
    jetson.script.main([])
    assert "--force" in jetson.capture.readouterr().err
    Path("timing.cache").write_bytes(b"of another")
    code, out, _ = jetson.run("--force")
    assert (code, "starting anew" in out) == (0, True)


def test_wrong_outputs_are_not_kept(device: Callable[..., Device]) -> None:
    jetson = device()
    for error in (0.5, float("nan")):
        jetson.played.error = error
        code, out, err = jetson.run()
        assert (code, "not kept" in err) == (3, True)
        assert "output 'y'" in out
    code, _, _ = jetson.run("--no-check")
    assert code == 0


@pytest.mark.parametrize(
    ("release", "said"),
    [
        ("# R35 (release), REVISION: 4.1, GCID: 1", "L4T 35.4.1 found, expected 36.4.3"),
        ("# R36 (release), REVISION: 3.0, GCID: 1", "L4T 36.3.0 found, expected 36.4.3"),
        ("something", "missing or damaged"),
        ("", "missing or damaged"),
    ],
)
def test_another_jetpack_is_refused(
    device: Callable[..., Device], tmp_path: Path, release: str, said: str
) -> None:
    jetson = device()
    (tmp_path / "release").write_text(release)
    code, _, err = jetson.run()
    assert (code, said in err) == (6, True), err


def test_other_versions_and_missing_parts_are_refused(
    device: Callable[..., Device], tmp_path: Path
) -> None:
    jetson = device()
    for version in ("8.6.2", "10.2.0", "11.1.0"):
        jetson.played.version = version
        code, _, err = jetson.run()
        assert (code, f"TensorRT {version} found, expected 10.3" in err) == (6, True), err
    jetson.played.version = "10.16.2"
    jetson.patch.setattr(jetson.script, "CUDART", ("libnone.so.{0}",))
    code, _, err = jetson.run()
    assert (code, "looked for libnone.so.12" in err) == (6, True), err
    jetson.patch.setitem(sys.modules, "tensorrt", None)
    assert jetson.script.main([]) == 6
    assert "python3-libnvinfer" in jetson.capture.readouterr().err
    (tmp_path / "release").unlink()
    assert jetson.run()[0] == 6


def test_too_little_room_is_refused(device: Callable[..., Device], tmp_path: Path) -> None:
    jetson = device()
    code, _, err = jetson.run("--workspace", "7000")
    assert (code, "memory: 5859 MiB free" in err) == (1, True), err
    usage = shutil.disk_usage(".")._replace(free=1 << 20)
    jetson.patch.setattr(shutil, "disk_usage", lambda path: usage)
    code, _, err = jetson.run()
    assert (code, "disk: 1 MiB free" in err) == (1, True), err


def test_parser_and_builder_refuse(device: Callable[..., Device]) -> None:
    jetson = device()
    jetson.played.refuses = "no importer"
    code, _, err = jetson.run()
    assert (code, "(Relu): no importer" in err) == (7, True), err
    jetson.played.refuses, jetson.played.no_engine = "", "no tactic"
    code, _, err = jetson.run()
    assert (code, "no tactic" in err) == (7, True), err
    jetson.played.no_engine = "CUDA error: out of memory"
    assert jetson.run()[0] == 1


def test_interrupted_build_leaves_nothing(device: Callable[..., Device]) -> None:
    jetson, before = device(), signal.getsignal(signal.SIGINT)

    def interrupt(monitor: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 5
        while not monitor.cancelled and time.monotonic() < deadline:
            time.sleep(0.01)

    jetson.played.interrupt = interrupt
    code, _, err = jetson.run()
    assert (code, "interrupted" in err) == (130, True)
    assert signal.getsignal(signal.SIGINT) is before
    assert list(Path().iterdir()) == []


def test_device_compiles_and_loads_the_plugin_once(
    device: Callable[..., Device], tmp_path: Path
) -> None:
    jetson = device(sparse())
    (tmp_path / "NvInferRuntime.h").touch()
    compiler = tmp_path / "nvcc"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; echo made > "$2"\n')
    compiler.chmod(0o755)
    jetson.patch.setenv("CUDACXX", str(compiler))
    jetson.patch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path))
    code, _, err = jetson.run()
    assert (code, err) == (0, "")
    assert jetson.played.seen["loads"] == 1
    assert Path("liboptimize_tensorrt.so").read_text() == "made\n"
    content = json.loads(Path("model.engine.manifest.json").read_text())
    assert content["plugin"] == "liboptimize_tensorrt.so"
    Path("model.engine").unlink()
    jetson.played.creators = [("GroupNorm", "")]
    code, _, err = jetson.run()
    assert (code, "registered are ::GroupNorm" in err) == (7, True), err
    jetson.played.plugin_loads = False
    code, _, err = jetson.run()
    assert (code, "could not be loaded" in err) == (7, True), err
    compiler.write_text("#!/bin/sh\necho wrong.cu: error; exit 2\n")
    code, _, err = jetson.run()
    assert (code, "wrong.cu: error" in err) == (7, True), err
    jetson.patch.setattr(jetson.script, "HEADERS", ())
    jetson.patch.delenv("TENSORRT_INCLUDE_DIR")
    code, _, err = jetson.run()
    assert (code, "libnvinfer-headers-dev" in err) == (6, True), err


def test_measures_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played_tensorrt.script(written(tmp_path / "b"), monkeypatch)
    sys.modules.pop("engine_check", None)
    check: Any = importlib.import_module("engine_check")
    random = np.random.default_rng(0).standard_normal(50)
    for kind, dtype in (
        (np.float32, "FLOAT"),
        (np.float16, "FLOAT16"),
        (ml_dtypes.bfloat16, "BFLOAT16"),
    ):
        a = random.astype(kind)
        b = (random * 1.25).astype(kind)
        found = check.compare("y", dtype, b.tobytes(), a.tobytes(), 0.1)
        wide = a.astype(np.float64), b.astype(np.float64)
        exact = np.linalg.norm(wide[1] - wide[0]) / np.linalg.norm(wide[0])
        assert found.found == pytest.approx(exact)
        assert found.too_large
    ints = np.arange(5)
    other = ints.copy()
    other[2] = 9
    assert check.compare("i", "INT64", other.tobytes(), ints.tobytes(), 0.1).found == 1
    assert not check.compare("i", "INT64", ints.tobytes(), ints.tobytes(), 0.1).too_large
    zero, tiny = np.zeros(3, np.float32), np.full(3, 1e-3, np.float32)
    assert check.compare("y", "FLOAT", tiny.tobytes(), zero.tobytes(), 0.1).too_large
    assert not check.compare("y", "FLOAT", zero.tobytes(), zero.tobytes(), 0.1).too_large
    low = np.array([-np.inf, 1], np.float32)
    assert not check.compare("y", "FLOAT", low.tobytes(), low.tobytes(), 0.1).too_large
    assert check.compare("y", "FLOAT", tiny[:2].tobytes(), low.tobytes(), 0.1).too_large
    assert check.compare("y", "FLOAT", low.tobytes(), tiny[:2].tobytes(), 0.1).too_large
    assert check.compare("y", "FLOAT", tiny[:2].tobytes(), tiny.tobytes(), 0.1).too_large
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    with pytest.raises(check.CheckError, match="cannot be read"):
        check.read_samples(str(tmp_path / "bad.npz"))


STYLES: dict[str, dict[str, Any]] = {
    "grouped, rotary": {},
    "cache": {"kv_cache": True},
    "encoder": {"style": "post-norm", "norm": "layer", "gated": False, "activation": "gelu",
                "rotary": False, "bias": True},
    "gelu-tanh": {"activation": "gelu-tanh", "style": "parallel"},
    "dynamic tanh": {"norm": "tanh", "activation": "quick-gelu"},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
@pytest.mark.parametrize("style", STYLES)
def test_what_is_lowered_for_jetson_is_taken(style: str, kind: str) -> None:
    config = models.Config(**STYLES[style])
    model = models.build(config)
    if kind == "float16":
        Fp16().call(model, Context(target="jetson"))
    if kind == "int8":
        data = outlier_cases.calibration(model, config)
        report = OutlierTune().call(model, Context(target="jetson", calibration=data))
        assert report.applied
    legalize(model, "jetson")
    check_supported(model)
