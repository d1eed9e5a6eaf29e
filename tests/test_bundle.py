"""The bundle for Jetson: what is written, what is refused, and its command with a played TensorRT."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import rule_case

from optimizer import graph as graphs
from optimizer.checks import check_model
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
from optimizer.model_io import load_model
from optimizer.pass_base import Context
from passes.fp16 import Fp16
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
    report = SparseMatMul(Options(force=True, precision="fp16")).call(
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
    check_model(load_model(folder / "model.onnx"))
    done = dry_run(folder)
    assert done.returncode == 0, done.stderr
    assert "--minShapes=x:1x3x64" in done.stdout
    assert "--stronglyTyped" in done.stdout
    assert "6 files" in done.stdout
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


@pytest.mark.tensorrt
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on the PATH")
def test_sources_of_a_bundle_become_the_plugin(
    tmp_path: Path, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "TENSORRT_INCLUDE_DIR" not in os.environ:
        pytest.skip("no headers of TensorRT; give their folder as TENSORRT_INCLUDE_DIR")
    folder = written(tmp_path / "b", sparse())
    script = device(folder)
    library = tmp_path / "liboptimize_tensorrt.so"
    script.build_plugin(str(folder), script.read_manifest(str(folder)), str(library))
    tool = shutil.which("nm")
    if tool is not None:
        run = subprocess.run(
            [tool, "-D", "--defined-only", library], capture_output=True, text=True
        )
        exports = {line.split()[-1] for line in run.stdout.splitlines()}
        assert exports == {"setLoggerFinder", "getCreators"}
    assert [p.name for p in tmp_path.glob("*.tmp")] == []


@pytest.mark.parametrize("name", ["model.onnx.data", "samples.npz", "build_engine.py"])
def test_a_changed_file_is_found(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path / "b")
    with (folder / name).open("ab") as file:
        file.write(b"\n")
    done = dry_run(folder)
    assert done.returncode == 2
    assert name in done.stderr
    (folder / name).write_bytes(b"") if name != "build_engine.py" else None
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
    with pytest.raises(OptionError, match="6.1, 6.2"):
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
