"""Module factories and module objects become ONNX files, or one clear error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from optimizer.errors import (
    ExportError,
    MissingDependencyError,
    ModelError,
    OptionError,
    UnsupportedError,
)
from optimizer.frontends import export_torch

SOURCE = """
import torch

class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(6, 11), torch.nn.Linear(11, 3)
        self.dropout = torch.nn.Dropout(0.5)
    def forward(self, x, scale):
        return self.down(self.dropout(torch.relu(self.up(x)))) * scale

def make():
    return Mlp(), (torch.ones(2, 6), torch.ones(2, 1))

def make_dynamic():
    return Mlp(), (torch.ones(2, 4, 6), torch.ones(2, 1, 1)), (
        {0: "batch", 1: "tokens"}, {0: "batch"})

def make_module():
    return Mlp()

def make_number():
    return 3, 4

def fail():
    raise RuntimeError("no weights on this disk")

class Holder:
    make = staticmethod(make)

value = 3
"""


class Scaled(torch.nn.Module):
    """Linear layer with a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = torch.nn.Linear(4, 5)

    def forward(self, x: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        y = self.linear(x)
        return y if gain is None else y * gain


class FixedBatch(torch.nn.Module):
    """Only works for the batch it was traced with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[i] * i for i in range(x.shape[0])])


class Untraceable(torch.nn.Module):
    """Control flow that depends on data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module of factories that no other test has imported."""
    name = re.sub(r"\W", "_", f"factories_{tmp_path.name}")
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path / name


def run(path: Path, *arrays: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    (result,) = session.run(None, dict(zip(names, arrays, strict=True)))
    return np.asarray(result)


def test_factory_gives_a_dynamic_batch_and_dropout_is_off(here: Path) -> None:
    path = export_torch(f"{here.name}:make", here.parent / "out")
    assert path.name == "make.onnx"
    model = ir.load(path)
    assert {str(v.name): str(v.shape) for v in model.graph.inputs} == {
        "x": "[batch,6]",
        "scale": "[batch,1]",
    }
    rng = np.random.default_rng(0)
    x, scale = rng.random((7, 6), np.float32), rng.random((7, 1), np.float32)
    weight = {k: v.const_value.numpy() for k, v in model.graph.initializers.items()}
    assert set(weight) == {"up.weight", "up.bias", "down.weight", "down.bias"}
    found = run(path, x, scale)
    torch.manual_seed(0)
    up, down = torch.nn.Linear(6, 11), torch.nn.Linear(11, 3)
    with torch.no_grad():
        expected = down(torch.relu(up(torch.from_numpy(x)))).numpy() * scale
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_factory_inside_a_class_and_with_its_own_dynamic_shapes(here: Path) -> None:
    assert export_torch(f"{here.name}:Holder.make", here.parent / "out").exists()
    path = export_torch(f"{here.name}:make_dynamic", here.parent / "out")
    inputs = ir.load(path).graph.inputs
    assert [str(value.shape) for value in inputs] == ["[batch,tokens,6]", "[batch,1,1]"]
    assert run(path, np.ones((3, 9, 6), np.float32), np.ones((3, 1, 1), np.float32)).shape[1] == 9


def test_module_object_with_names_and_keyword_inputs(tmp_path: Path) -> None:
    module = Scaled().train()
    path = export_torch(
        module,
        tmp_path,
        example_inputs={"gain": torch.ones(5), "x": torch.ones(2, 4)},
        dynamic_shapes={"x": {0: "rows"}, "gain": None},
        input_names=["features", "gain"],
        output_names=["scores"],
        opset=18,
    )
    model = ir.load(path)
    assert path.name == "Scaled.onnx"
    assert [str(value.shape) for value in model.graph.inputs] == ["[rows,4]", "[5]"]
    assert [value.name for value in model.graph.outputs] == ["scores"]
    assert model.opset_imports[""] == 18
    x, gain = np.full((6, 4), 0.5, np.float32), np.arange(5, dtype=np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(x), torch.from_numpy(gain)).numpy()
    np.testing.assert_allclose(run(path, x, gain), expected, rtol=1e-5, atol=1e-6)


def test_module_without_a_possible_dynamic_batch_gets_fixed_sizes(tmp_path: Path) -> None:
    path = export_torch(FixedBatch(), tmp_path, example_inputs=torch.ones(3, 2))
    assert [str(value.shape) for value in ir.load(path).graph.inputs] == ["[3,2]"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_package.models:make", "no module named no_such_package"),
        ("{here}:mkae", "has no 'mkae'; did you mean 'make'"),
        ("{here}:Holder.mak", "has no 'mak'; did you mean 'make'"),
        ("{here}:value", "is a int, expected a function"),
        ("{here}:make_module", r"returned Mlp; expected \(module, example_inputs\)"),
        ("{here}:make_number", r"returned int in the first place; expected \(module"),
        ("{here}:fail", "failed when called: RuntimeError: no weights on this disk"),
        ("nothing", "expected package.module:factory"),
    ],
)
def test_unusable_factories_are_refused(spec: str, message: str, here: Path) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        export_torch(spec.format(here=here.name), here.parent / "out")
    assert "\n" not in str(caught.value)
    assert not (here.parent / "out").exists()


def test_factory_module_that_cannot_be_imported_is_refused(here: Path) -> None:
    (here.parent / f"{here.name}_broken.py").write_text("def f(:\n")
    with pytest.raises(ModelError, match=r"importing .* fails: SyntaxError"):
        export_torch(f"{here.name}_broken:f", here.parent)
    (here.parent / f"{here.name}_needs.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(ModelError, match="needs not_installed_anywhere"):
        export_torch(f"{here.name}_needs:f", here.parent)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, "needs example_inputs"),
        (3, "example_inputs is a int"),
        ((1, 2), "hold no tensor"),
        ({"gian": torch.ones(5)}, "names 'gian', .*did you mean 'gain'"),
    ],
)
def test_unusable_example_inputs_are_refused(inputs: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        export_torch(Scaled(), tmp_path, example_inputs=inputs)


def test_module_that_torch_cannot_trace_is_one_line_with_the_cause(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="torch could not export Untraceable: ") as caught:
        export_torch(Untraceable(), tmp_path / "out", example_inputs=torch.ones(2, 2))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_objects_that_are_no_module_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot export a int: expected a torch\.nn\.Module"):
        export_torch(3, tmp_path)


def test_missing_torch_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'optimize-onnx\[torch\]'"):
        export_torch("a:b", tmp_path)


def test_large_weights_go_to_a_file_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimizer.frontends.onnx_export.EXTERNAL_DATA_BYTES", 50)
    module = torch.nn.Linear(40, 40)
    path = export_torch(module, tmp_path, example_inputs=torch.ones(2, 40))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Linear.onnx", "Linear.onnx.data"]
    x = np.ones((3, 40), np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run(path, x), expected, rtol=1e-5, atol=1e-6)


def test_disk_that_fills_up_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: ir.Model, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(ExportError, match=r"cannot be written .*No space left on device"):
        export_torch(torch.nn.Linear(3, 3), tmp_path, example_inputs=torch.ones(2, 3))
    assert not list(tmp_path.iterdir())
