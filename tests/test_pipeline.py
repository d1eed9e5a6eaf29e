"""The pipeline: what it checks after each pass, what it reports, and how it refuses."""

from __future__ import annotations

from typing import Any

import demo_passes as demo
import models
import numpy as np
import pytest
from conftest import token_samples

from optimizer.calibration import Calibration, input_specs
from optimizer.errors import (
    BudgetError,
    CalibrationError,
    NoopError,
    OptimizerError,
    PassContractError,
    VerificationError,
)
from optimizer.pass_base import GraphPass
from optimizer.pipeline import Data, Run
from optimizer.recipe import Recipe, Settings, Step
from optimizer.report import RunReport
from optimizer.samples import load_samples


def recipe(*classes: type[GraphPass[Any]], **settings: Any) -> Recipe:
    steps = tuple(Step(item, item.Options(), item.name) for item in classes)
    return Recipe(steps, Settings(**settings))


def start(*classes: type[GraphPass[Any]], data: bool = False, **options: Any) -> Run:
    names = Settings.model_fields
    settings = {key: options.pop(key) for key in list(options) if key in names}
    model = models.build()
    calibration = None
    if data:
        calibration = Calibration(load_samples(token_samples(), input_specs(model)))
    return Run(model, recipe(*classes, **settings), Data(calibration), **options)


def execute(*classes: type[GraphPass[Any]], **options: Any) -> RunReport:
    return start(*classes, **options).execute()


def row(report: RunReport, name: str) -> Any:
    return next(item for item in report.rows if item.name == name)


def test_canonicalize_comes_first_and_lowering_last() -> None:
    report = execute(demo.Scale, demo.Swap)
    assert [item.name for item in report.rows] == ["canonicalize", "scale", "swap", "legalize"]


def test_a_bitwise_pass_is_proven_bit_by_bit() -> None:
    assert "bit by bit" in row(execute(demo.Swap), "swap").verdict


def test_a_false_claim_of_exactness_names_the_pass() -> None:
    with pytest.raises(VerificationError, match="pass 'wrong'"):
        execute(demo.Wrong)


def test_verification_can_be_left_to_the_end() -> None:
    report = execute(demo.Swap, verify="final")
    assert row(report, "swap").verdict is None
    assert row(report, "legalize").verdict is not None
    with pytest.raises(VerificationError):
        execute(demo.Wrong, verify="final")


def test_verification_can_be_switched_off() -> None:
    report = execute(demo.Wrong, verify="off", data=True)
    assert all(item.verdict is None and item.drift is None for item in report.rows)


def test_the_drift_of_an_approximate_pass_is_measured_against_the_original() -> None:
    report = execute(demo.Scale, demo.Swap, data=True)
    assert row(report, "scale").drift.relative_l2 == pytest.approx(1e-3, rel=0.01)
    assert row(report, "swap").drift is None, "an exact pass is proven instead"
    assert report.drift is not None
    assert report.drift.relative_l2 == pytest.approx(1e-3, rel=0.01)
    assert report.samples == 6


def test_without_data_an_approximate_pass_runs_unmeasured() -> None:
    report = execute(demo.Scale)
    assert report.drift is None
    assert row(report, "scale").verdict is None
    assert row(report, "legalize").verdict == "runs, on made-up inputs"


def test_what_cannot_run_is_refused_without_data_too() -> None:
    with pytest.raises(OptimizerError, match=r"pass 'legalize'.*out of"):
        execute(demo.Overreach)
    assert execute(demo.Overreach, verify="off").rows


def test_a_result_that_is_not_finite_is_refused() -> None:
    with pytest.raises(VerificationError, match=r"pass 'explode'.*not finite"):
        execute(demo.Explode, data=True)


@pytest.mark.parametrize("budget", ["relative_l2<=0.01", "top1>=0.99,cosine>=0.999", "kl<=0.01"])
def test_a_budget_that_holds_changes_nothing(budget: str) -> None:
    assert execute(demo.Scale, data=True, budget=budget).missed is None


def test_a_missed_budget_is_an_error_unless_the_result_is_kept() -> None:
    with pytest.raises(BudgetError, match=r"relative_l2<=1e-5: measured 0\.00"):
        execute(demo.Scale, data=True, budget="relative_l2<=1e-5")
    report = execute(demo.Scale, data=True, budget="relative_l2<=1e-5", keep_missed=True)
    assert report.missed is not None


def test_a_budget_without_data_or_verification_is_refused() -> None:
    with pytest.raises(CalibrationError, match="--eval"):
        execute(demo.Scale, budget="relative_l2<=1")
    with pytest.raises(CalibrationError, match="--verify"):
        execute(demo.Scale, budget="relative_l2<=1", data=True, verify="off")


def test_a_pass_that_needs_data_says_what_to_add() -> None:
    with pytest.raises(CalibrationError, match=r"'hungry'.*--calibration"):
        execute(demo.Hungry)
    assert row(execute(demo.Hungry, data=True), "hungry").details == {"samples": 6}


def test_a_pass_that_hides_its_changes_is_a_defect() -> None:
    with pytest.raises(PassContractError, match="'liar'"):
        execute(demo.Liar)


def test_a_crash_in_a_pass_is_a_defect_of_the_pass() -> None:
    with pytest.raises(PassContractError, match=r"'crash'.*KeyError"):
        execute(demo.Crash)


def test_nothing_matched_is_an_error_only_if_asked_for() -> None:
    report = execute(demo.Nothing)
    assert report.matched() == 0
    assert row(report, "nothing").skipped[0].reason == "it is not blue"
    with pytest.raises(NoopError, match="it is not blue"):
        execute(demo.Nothing, fail_on_noop=True)
    with pytest.raises(NoopError, match="no pass was named"):
        execute(fail_on_noop=True)
    assert execute(demo.Nothing, demo.Swap, fail_on_noop=True).matched() > 0


def test_a_plan_neither_measures_nor_lowers() -> None:
    report = execute(demo.Scale, data=True, plan_only=True)
    assert [item.name for item in report.rows] == ["canonicalize", "scale"]
    assert report.drift is None


def test_the_report_holds_extent_time_and_memory() -> None:
    report = execute(demo.Swap)
    for item in report.rows:
        assert item.after.nodes > 0
        assert item.after.bytes > 10_000
        assert 0 <= item.seconds < 60
        assert item.peak_bytes > 10_000_000
    assert report.after == report.rows[-1].after


def test_the_listener_hears_every_stage() -> None:
    heard: list[str] = []

    class Ear:
        def stage(self, title: str) -> None:
            heard.append(title)

        def progress(self, done: int, total: int) -> None:
            assert 0 < done <= total

        def note(self, text: str) -> None:
            heard.append(text)

    execute(demo.Scale, data=True, listener=Ear())
    assert "canonicalize" in heard
    assert "scale: measuring drift" in heard
    assert "legalize for ort-cpu" in heard


def test_the_result_says_what_made_it_and_nothing_of_the_host() -> None:
    run = start(demo.Scale, verify="off")
    node = next(iter(run.model.graph))
    node.metadata_props["pkg.torch.onnx.stack_trace"] = "File /home/somebody/model.py"
    run.execute()
    assert run.model.producer_name == "optimize-onnx"
    assert "scale" in run.model.metadata_props["optimize.recipe"]
    for item in run.model.graph:
        assert not any(key.startswith("pkg.torch") for key in item.metadata_props)


def test_settings_that_do_not_change_the_result_do_not_change_the_model() -> None:
    texts = set()
    for settings in ({"verify": "off"}, {"verify": "each"}, {"external_data": "always"}):
        run = start(demo.Swap, **settings)
        run.execute()
        texts.add(run.model.metadata_props["optimize.recipe"])
    assert len(texts) == 1


def test_weights_of_the_original_are_left_alone() -> None:
    run = start(demo.Scale, verify="off")
    model = run.model
    weight = demo.last_product(model).inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    tensor = weight.const_value
    before = np.array(tensor.numpy())
    run.execute()
    np.testing.assert_array_equal(tensor.numpy(), before)
