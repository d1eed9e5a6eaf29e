"""Reports and manifests: complete, JSON-compatible, and the same for the same run."""

from __future__ import annotations

import json
from dataclasses import replace

import demo_passes as demo
import models
import onnx_ir as ir
import pytest
from conftest import token_samples
from rich.console import Console

from optimizer.calibration import Calibration, input_specs
from optimizer.cli import screen
from optimizer.job import Result
from optimizer.metrics import Drift
from optimizer.pass_base import Skip
from optimizer.pipeline import Data, Run
from optimizer.recipe import Recipe, Settings, Step
from optimizer.report import RunReport, library_versions, make_manifest
from optimizer.samples import load_samples


@pytest.fixture(scope="module")
def finished() -> tuple[RunReport, Recipe]:
    steps = tuple(Step(item, item.Options(), item.name) for item in (demo.Scale, demo.Nothing))
    recipe = Recipe(steps, Settings())
    model = models.build()
    data = Data(Calibration(load_samples(token_samples(), input_specs(model))))
    return Run(model, recipe, data, source="m.onnx").execute(), recipe


def manifest(report: RunReport, recipe: Recipe) -> dict[str, object]:
    return make_manifest(
        report,
        recipe,
        inputs=[("m.onnx", "00")],
        outputs=[("m.opt.onnx", "11")],
        data={"calibration": "22"},
        kv_cache=None,
    )


def test_a_report_survives_json(finished: tuple[RunReport, Recipe]) -> None:
    content = json.loads(json.dumps(finished[0].as_dict()))
    assert [item["pass"] for item in content["passes"]] == [
        "canonicalize",
        "scale",
        "nothing",
        "legalize",
    ]
    assert content["passes"][2]["skipped"][0] == {"site": "layer 0", "reason": "it is not blue"}
    assert content["drift"]["relative_l2"] == pytest.approx(1e-3, rel=0.01)


def test_a_manifest_names_tool_options_hashes_and_versions(
    finished: tuple[RunReport, Recipe],
) -> None:
    content = json.loads(json.dumps(manifest(*finished)))
    assert content["tool"]["name"] == "optimize-onnx"
    assert content["recipe"]["passes"][0] == {"pass": "scale", "factor": 1.001}
    assert content["inputs"] == [{"file": "m.onnx", "sha256": "00"}]
    assert content["outputs"] == [{"file": "m.opt.onnx", "sha256": "11"}]
    assert content["statistics"][1]["details"] == {"factor": 1.001}
    assert {"numpy", "onnx", "onnx-ir"} <= set(library_versions())


def test_reasons_are_grouped_unless_all_are_asked_for(finished: tuple[RunReport, Recipe]) -> None:
    rows = [row for row in finished[0].rows if row.name == "nothing"]
    assert screen.skip_lines(rows, every=False) == [
        "  nothing left layer 0, layer 1 alone: it is not blue"
    ]
    assert len(screen.skip_lines(rows, every=True)) == 2


def test_many_reasons_are_counted_and_notes_are_shown(
    finished: tuple[RunReport, Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    report, recipe = finished
    row = next(row for row in report.rows if row.name == "nothing")
    skips = tuple(Skip(f"node {i}", f"reaches {i // 2}") for i in range(24))
    many = replace(row, skipped=skips, notes=("nothing gets faster",))
    lines = screen.skip_lines([many], every=False)
    assert lines[0] == "  nothing left node 0, node 1 alone: reaches 0"
    assert lines[8:] == ["  nothing left 8 more alone for 4 other reasons; --explain lists them"]
    assert len(screen.skip_lines([many], every=True)) == 24
    noted = replace(report, rows=[many])
    result = Result(ir.Model(ir.Graph([], [], nodes=[]), ir_version=10), noted, {}, recipe, None)
    screen.print_result(result, explain=False, dry_run=True)
    assert "  nothing: nothing gets faster" in capsys.readouterr().out
    assert many.statistics()["notes"] == ["nothing gets faster"]


@pytest.mark.parametrize("width", [80, 110])
def test_no_line_of_the_table_is_wrapped(
    finished: tuple[RunReport, Recipe],
    width: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report, recipe = finished
    monkeypatch.setattr(screen, "console", lambda: Console(width=width))
    result = Result(ir.Model(ir.Graph([], [], nodes=[]), ir_version=10), report, {}, recipe, None)
    screen.print_result(result, explain=False, dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.split(" ")[0] in {row.name for row in report.rows}]
    assert [line.split()[0] for line in table] == [row.name for row in report.rows]
    assert any("exact: " in line and "(bound " in line for line in lines)


def test_the_drift_line_holds_what_has_a_meaning() -> None:
    assert screen.drift_text(Drift(0.01, 0.9999, 0.1)) == "relative L2 0.01, cosine 0.999900"
    text = screen.drift_text(
        Drift(0.01, 0.9999, 0.1, top1=0.5, kl=0.25, perplexity=4.4, perplexity_reference=4.0)
    )
    assert "top-1 50.00 %, KL 0.25, perplexity 4 -> 4.4 (+10.00 %)" in text
