"""The Python interface: what it takes, what it gives back, what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo_passes
import models
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Outcome, token_samples

from optimizer.api import compare, optimize
from optimizer.errors import (
    BudgetError,
    CalibrationError,
    OptionError,
    RecipeError,
    VerificationError,
)
from optimizer.model_io import hash_file, load_model
from optimizer.recipe import load_recipe, to_toml

DEMO = Path(demo_passes.__file__)
SCALE, SWAP, WRONG = (f"{DEMO}:{name}" for name in ("Scale", "Swap", "Wrong"))


def files(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_a_file_is_optimized_beside_itself(small: Path) -> None:
    result = optimize(small, [SCALE])
    assert result.path == small.with_name("small.opt.onnx")
    assert files(small.parent) == [
        "small.calibration.npz",
        "small.onnx",
        "small.opt.onnx",
        "small.opt.onnx.manifest.json",
    ]
    onnx.checker.check_model(str(result.path))
    assert result.report.drift is not None
    assert result.report.drift.relative_l2 == pytest.approx(1e-3, rel=0.01)


def test_the_manifest_beside_the_output_is_that_of_the_result(small: Path) -> None:
    result = optimize(small, [SCALE])
    assert result.path is not None
    manifest = json.loads(result.files[-1].read_text())
    assert manifest == json.loads(json.dumps(result.manifest))
    assert manifest["outputs"][0]["sha256"] == hash_file(result.path)
    assert manifest["inputs"] == [{"file": "small.onnx", "sha256": hash_file(small)}]
    assert manifest["data_sha256"]["calibration"]


def test_passes_come_as_text_as_list_and_as_pairs(small: Path) -> None:
    texts = [
        optimize(small, passes, write=False, verify="off").model.metadata_props["optimize.recipe"]
        for passes in (
            f"{SCALE}:factor=1.01,{SWAP}",
            [f"{SCALE}:factor=1.01", SWAP],
            [(SCALE, {"factor": 1.01}), SWAP],
        )
    ]
    assert len(set(texts)) == 1


@pytest.mark.parametrize("kind", ["ir", "proto"])
def test_a_model_in_memory_is_returned_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model: Any = models.build()
    if kind == "proto":
        model = ir.to_proto(model)
    before = model.SerializeToString() if kind == "proto" else len(list(model.graph))
    result = optimize(model, [SCALE], calibration=token_samples())
    assert result.path is None
    assert files(tmp_path) == []
    after = model.SerializeToString() if kind == "proto" else len(list(model.graph))
    assert before == after


def test_data_comes_as_mapping_file_folder_and_function(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    arrays = token_samples()["input_ids"]
    for index in range(len(arrays)):
        np.savez(folder / f"{index}.npz", input_ids=arrays[index : index + 1])
    (tmp_path / "feeder.py").write_text(
        "import numpy\n"
        "def feeds():\n"
        f"    data = numpy.load({str(small.with_name('small.calibration.npz'))!r})\n"
        "    for row in data['input_ids']:\n"
        "        yield {'input_ids': row[None]}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    drifts = [
        optimize(small, [SCALE], calibration=data, write=False).report.drift
        for data in (token_samples(), None, folder, "feeder:feeds")
    ]
    assert drifts[0] is not None
    assert all(drift == drifts[0] for drift in drifts)


def test_a_language_model_writes_its_own_data(small: Path) -> None:
    result = optimize(small, [SCALE], calibration="self", samples=2, write=False)
    assert result.report.samples == 2


def test_samples_limits_the_data(small: Path) -> None:
    assert optimize(small, [SCALE], samples=3, write=False).report.samples == 3


def test_evaluation_data_is_what_drift_is_measured_on(small: Path) -> None:
    held_out = {"input_ids": token_samples(count=2)["input_ids"]}
    assert optimize(small, [SCALE], evaluation=held_out, write=False).report.samples == 2
    np.savez(small.with_name("small.eval.npz"), **token_samples(count=4))
    assert optimize(small, [SCALE], write=False).report.samples == 4


def test_two_runs_give_the_same_bytes(small: Path, tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        result = optimize(small, [SCALE, SWAP], output=tmp_path / f"{name}.onnx")
        digests.add(hash_file(result.files[0]))
        result.manifest.pop("run")
    assert len(digests) == 1


def test_a_resolved_recipe_fed_back_gives_the_same_bytes(small: Path, tmp_path: Path) -> None:
    first = optimize(
        small,
        [f"{SCALE}:factor=1.01"],
        output=tmp_path / "a.onnx",
        samples=4,
        budget="cosine>=0.9",
        save_recipe=tmp_path / "r.toml",
    )
    second = optimize(small, recipe=tmp_path / "r.toml", output=tmp_path / "b.onnx")
    assert hash_file(first.files[0]) == hash_file(second.files[0])
    texts = {
        to_toml(item) for item in (load_recipe(tmp_path / "r.toml"), first.recipe, second.recipe)
    }
    assert len(texts) == 1


def test_other_data_than_the_recipe_was_written_with_is_noted(small: Path, tmp_path: Path) -> None:
    optimize(small, [SCALE], output=tmp_path / "a.onnx", save_recipe=tmp_path / "r.toml")
    np.savez(small.with_name("small.calibration.npz"), **token_samples(count=3))
    notes: list[str] = []

    class Ear:
        def stage(self, title: str) -> None: ...
        def progress(self, done: int, total: int) -> None: ...
        def note(self, text: str) -> None:
            notes.append(text)

    optimize(small, recipe=tmp_path / "r.toml", write=False, listener=Ear())
    assert any("not what the recipe was written with" in text for text in notes)


def test_passes_and_recipe_exclude_each_other(small: Path, tmp_path: Path) -> None:
    optimize(small, [SCALE], write=False, save_recipe=tmp_path / "r.toml")
    with pytest.raises(OptionError, match="not from both"):
        optimize(small, [SCALE], recipe=tmp_path / "r.toml")


def test_a_failed_run_writes_nothing(small: Path) -> None:
    before = files(small.parent)
    with pytest.raises(VerificationError):
        optimize(small, [WRONG], save_recipe=small.with_name("r.toml"))
    with pytest.raises(BudgetError):
        optimize(small, [SCALE], budget="relative_l2<=1e-6")
    with pytest.raises(RecipeError, match="right order"):
        optimize(small, [SWAP, SCALE])
    assert files(small.parent) == before


def test_a_missed_budget_can_be_kept(small: Path) -> None:
    result = optimize(small, [SCALE], budget="relative_l2<=1e-6", keep_missed=True)
    assert result.report.missed is not None
    assert result.path is not None
    assert result.path.exists()


def test_a_missed_speedup_writes_nothing(small: Path) -> None:
    with pytest.raises(BudgetError, match="1000 required"):
        optimize(small, [SCALE], require_speedup=1000)
    assert not small.with_name("small.opt.onnx").exists()
    result = optimize(small, [SCALE], bench=True)
    assert result.report.speedup is not None
    assert "times as fast" in result.report.speedup["text"]


def test_a_dry_run_writes_nothing(small: Path) -> None:
    before = files(small.parent)
    result = optimize(small, [SCALE], dry_run=True, save_recipe=small.with_name("r.toml"))
    assert result.report.matched() == 1
    assert files(small.parent) == before


def test_a_missing_calibration_is_known_before_the_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="--calibration"):
        optimize(tmp_path / "missing.onnx", [f"{DEMO}:Hungry"])


def test_an_unknown_keyword_is_refused(small: Path) -> None:
    with pytest.raises(OptionError, match="did you mean 'verify'"):
        optimize(small, verfy="off")


def test_weights_go_outside_where_the_input_had_them_outside(tmp_path: Path) -> None:
    from optimizer.model_io import save_model

    path = tmp_path / "m.onnx"
    save_model(models.build(), path, "always")
    result = optimize(path)
    assert [item.name for item in result.files] == [
        "m.opt.onnx",
        "m.opt.onnx.data",
        "m.opt.onnx.manifest.json",
    ]


def test_our_own_output_is_accepted_as_input(small: Path, tmp_path: Path) -> None:
    first = optimize(small, [SCALE], output=tmp_path / "a.onnx")
    second = optimize(first.path, [SWAP], output=tmp_path / "b.onnx")
    assert second.report.rows[-1].after.nodes <= first.report.rows[-1].after.nodes


def test_two_files_are_compared(small: Path, tmp_path: Path) -> None:
    result = optimize(small, [f"{SCALE}:factor=1.01"], output=tmp_path / "a.onnx")
    assert result.path is not None
    found = compare(small, result.path)
    assert found.drift.relative_l2 == pytest.approx(1e-2, rel=0.01)
    assert "small.calibration.npz" in found.source
    assert compare(small, small).drift.relative_l2 == 0


def test_data_beside_the_model_that_links_elsewhere_is_not_read(
    small: Path, command: Callable[..., Outcome]
) -> None:
    folder = small.parent / "downloaded"
    folder.mkdir()
    model = small.rename(folder / "small.onnx")
    (folder / "small.calibration.npz").symlink_to("../small.calibration.npz")
    found = command(model, "--passes", SCALE)
    assert "is not read; to use it, name it with --calibration" in found.err
    assert compare(model, model).source == "made-up inputs"


def test_the_result_runs_and_answers_the_same(small: Path) -> None:
    import onnxruntime

    result = optimize(small, [SWAP])
    feed = token_samples()
    feed["attention_mask"] = np.ones_like(feed["input_ids"])
    feed["position_ids"] = np.tile(np.arange(12), (6, 1))
    before, after = (
        onnxruntime.InferenceSession(str(path)).run(["logits"], feed)[0]
        for path in (small, result.path)
    )
    np.testing.assert_allclose(before, after, rtol=0, atol=1e-5 * np.abs(before).max())


def test_every_weight_of_a_written_model_is_finite(small: Path) -> None:
    result = optimize(small, [SCALE])
    assert result.path is not None
    assert load_model(result.path)


def test_a_torch_module_is_exported_and_optimized(tmp_path: Path) -> None:
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    example = torch.randn(2, 8)
    result = optimize(module, example_inputs=(example,), output=tmp_path / "mlp.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(result.path))
    found = session.run(None, {session.get_inputs()[0].name: example.numpy()})[0]
    np.testing.assert_allclose(found, module(example).detach().numpy(), rtol=0, atol=1e-5)
