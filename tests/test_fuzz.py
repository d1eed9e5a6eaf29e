"""A small sample of ``benchmarks/fuzz.py``, always the same; and that it sees what is wrong."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from fuzzing.drill import FAULTS, MISTAKE
from fuzzing.generate import make_case
from fuzzing.oracle import Judge, feeds_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "benchmarks" / "fuzz.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module
    spec.loader.exec_module(module)
    return module


@settings(
    max_examples=60,
    phases=(Phase.generate,),
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.function_scoped_fixture),
)
@given(random=st.randoms(use_true_random=False, note_method_calls=False))
def test_random_graphs_compute_the_same_after_every_rewrite(tmp_path: Path, random) -> None:
    case = make_case(random)
    path = tmp_path / "m.onnx"
    path.write_bytes(case.model.SerializeToString())
    verdict = Judge(path, tmp_path / "out.onnx").run(feeds_of(case.feeds))
    assert verdict.fine, verdict


def test_damaged_and_hostile_files_are_refused_or_compute_the_same(
    fuzz: ModuleType, tmp_path: Path
) -> None:
    tally = fuzz.Tally(0)
    fuzz.run("loader", tally, 40, time.time() + 600, tmp_path)
    assert tally.findings == []
    assert tally.outcomes.total() == 40
    assert tally.outcomes["refused"] > 5
    assert tally.outcomes["agrees"] > 2


def test_whatever_goes_wrong_is_seen_and_its_input_kept(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "LIMIT", 4.0)
    tally = fuzz.Tally(0)
    fuzz.run("drill", tally, MISTAKE + 1, time.time() + 600, tmp_path)
    found = {finding["number"]: finding["kind"] for finding in tally.findings}
    fine = ("agrees", "strict")
    expected = {n: kind for n, (_, kind) in enumerate(FAULTS) if kind not in fine}
    assert found == {**expected, MISTAKE: "mismatch"}
    assert tally.outcomes["strict"] == 1
    assert {item.name for item in tmp_path.iterdir()} == {"drill-10", "drill-11"}
    assert (tmp_path / "drill-10" / "model.onnx").stat().st_size > 0


def test_a_campaign_goes_on_where_it_stopped(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    for inputs in ("2", "3"):
        words = ["fuzz.py", "graph", "--inputs", inputs, "--seed", "7", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", words)
        fuzz.main()
        content = json.loads(out.read_text())
        assert content["engines"]["graph"]["next"] == 7 + int(inputs)
        assert content["inputs"] == sum(content["engines"]["graph"]["outcomes"].values())
    assert (content["crashes"], content["hangs"], content["mismatches"]) == (0, 0, 0)
