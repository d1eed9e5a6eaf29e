"""The suite for passes: the built-in ones and the template pass it, broken ones fail by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import bad_passes
import models
import onnx_ir as ir
import pytest
from conftest import Outcome as Ran

from optimizer import conformance
from optimizer.checks import check_graph
from optimizer.conformance import MODELS, Outcome, Status, check, conformance_tests, elsewhere
from optimizer.model_io import save_model
from optimizer.pass_base import Exactness, GraphPass, PassOptions
from optimizer.pass_template import RemoveOnes
from passes import PASS_NAMES, get_pass

ROOT = Path(__file__).resolve().parent.parent

#: Options to try besides the defaults, so that the suite's models have sites.
OPTIONS: dict[str, list[dict[str, object]]] = {
    "canonicalize": [],
    "cqil": [{"first": 0, "last": 1}],
    "tome": [{"r": 3}, {"keep": 0.3, "lowering": "matrix", "places": True}],
    "crossget": [{"r": 3}, {"keep": 0.3, "lowering": "matrix", "guidance": "none"}],
    "prune-tokens": [{"r": 3}, {"keep": 0.3, "lowering": "matrix", "guidance": "all"}],
    "sparsify": [
        {"method": "magnitude", "heads": True, "embeddings": True},
        {"pattern": "unstructured", "sparsity": 0.3, "allocation": "damage", "method": "wanda"},
    ],
    "outliertune": [],
    "fuse-concurrent": [{"pack": "always", "stack": "always"}],
    "sparse-matmul": [{"force": True}, {"force": True, "precision": "int8"}],
    "fp16": [{"io": "half"}],
    "bf16": [{"io": "half"}],
}


def failed(outcomes: list[Outcome]) -> list[str]:
    """What failed, but for the documentation that most bad passes leave out."""
    wrong = [item for item in outcomes if item.status is Status.FAILED]
    return [str(item) for item in wrong if item.check != "documentation"]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the checks in another process, which take a second each."""
    monkeypatch.setattr(conformance, "check_elsewhere", lambda *_: ())


# The models


@pytest.mark.parametrize("sample", MODELS, ids=[sample.name for sample in MODELS])
def test_every_model_of_the_suite_is_legal_and_always_the_same(
    sample: conformance.models.Sample,
) -> None:
    check_graph(sample.build(), "model", operators={("acme", "Twist")})
    first, second = (ir.to_proto(sample.build()).SerializeToString() for _ in range(2))
    assert first == second


# Passes that conform


def test_every_built_in_pass_is_tried() -> None:
    assert set(OPTIONS) == set(PASS_NAMES)


@pytest.mark.parametrize("name", PASS_NAMES)
def test_a_built_in_pass_conforms_and_finds_something_to_do(name: str) -> None:
    outcomes = list(check(get_pass(name), OPTIONS[name]))
    assert failed(outcomes) == []
    assert {item.check for item in outcomes} == set(conformance.CHECKS)
    rewritten = [item for item in outcomes if item.check == "sites"]
    assert any(item.status is Status.PASSED for item in rewritten)
    assert not [item for item in outcomes if "another process" in item.subject]


test_the_template_conforms = conformance_tests(RemoveOnes, options=[{"tolerance": 0.1}])


def test_the_printed_template_conforms_on_the_command_line(
    command: Callable[..., Ran], tmp_path: Path
) -> None:
    printed = command("passes", "--template")
    assert printed.code == 0
    (tmp_path / "my.py").write_text(printed.out)
    found = command("passes", f"{tmp_path}/my.py:RemoveOnes", "--conformance")
    assert found.code == 0, found.out
    assert found.out.splitlines()[-1] == "the pass conforms"
    for name in conformance.CHECKS:
        assert any(line.startswith(f"{name} ") for line in found.out.splitlines()), name


# Passes that do not: class, check that must fail, what it must say

BROKEN: list[tuple[type[GraphPass[PassOptions]], str, str]] = [
    (bad_passes.Undocumented, "documentation", "no line 'Rewrite: ...'"),
    (bad_passes.Unexplained, "options", "option 'number' has no description"),
    (bad_passes.Opaque, "recipe", "cannot be written to a recipe"),
    (bad_passes.Crashing, "runs", "bad_passes.py:"),
    (bad_passes.HalfWay, "runs", "left the graph changed: it is not blue"),
    (bad_passes.Wordless, "runs", "call returned NoneType"),
    (bad_passes.Liar, "invariants", "reports modified=False, but node"),
    (bad_passes.Renaming, "invariants", "changed the graph outputs"),
    (bad_passes.Unreasoned, "report", "says not what and why"),
    (bad_passes.Boasting, "report", "applied=2 with modified=False"),
    (bad_passes.Detailed, "report", "are not JSON"),
    (bad_passes.Freezing, "symbols", "axis 0 of input"),
    (bad_passes.Inexact, "exactness", "is allowed"),
    (bad_passes.Exploding, "exactness", "not finite"),
    (bad_passes.Counting, "deterministic", "a second run on a copy of the model gives another"),
    (bad_passes.Remembering, "deterministic", "an object that rewrote other models before"),
    (bad_passes.Defiant, "gate", "asked whether to rewrite the first node, was told no"),
    (bad_passes.Freezing, "second-run", "it fails here: IndexError at"),
    (bad_passes.Growing, "second-run", "a second run changes the graph again"),
]


@pytest.mark.parametrize(
    ("pass_class", "name", "says"), BROKEN, ids=[c[0].__name__ for c in BROKEN]
)
@pytest.mark.usefixtures("one_process")
def test_a_broken_promise_is_found_and_explained(
    pass_class: type[GraphPass[PassOptions]], name: str, says: str
) -> None:
    wrong = [item for item in check(pass_class) if item.status is Status.FAILED]
    texts = [item.found for item in wrong if item.check == name]
    assert any(says in text for text in texts), wrong
    assert all(item.advice for item in wrong)


@pytest.mark.usefixtures("one_process")
def test_an_option_that_recipes_lose_is_found() -> None:
    outcomes = list(check(bad_passes.Forgetful, [{"number": None}]))
    (wrong,) = [item for item in outcomes if item.check == "recipe" and item.found]
    assert wrong.found == "a recipe turns them into default"
    assert "None as default" in wrong.advice


def test_a_pass_without_faults_has_none_but_in_its_notes() -> None:
    outcomes = list(check(bad_passes.Good))
    assert failed(outcomes) == []
    assert outcomes[-1].found == "rewrites decoder, encoder, vision, parallel"
    notes = {item.found for item in outcomes if item.status is Status.NOTE}
    assert notes == {"it rewrites without asking context.gate.allow(site)"}


@pytest.mark.usefixtures("one_process")
def test_refusals_and_vain_reading_are_notes() -> None:
    outcomes = list(check(bad_passes.Refusing))
    assert failed(outcomes) == []
    assert len([i for i in outcomes if i.check == "runs" and "not blue" in i.found]) == len(MODELS)
    outcomes = list(check(bad_passes.Reading))
    assert failed(outcomes) == []
    notes = [item for item in outcomes if item.check == "weights" and item.found]
    assert any(note.found.endswith("weights and changes nothing") for note in notes)


@pytest.mark.parametrize(("declared", "says"), [
    ({"name": "Not Kebab"}, "name is 'Not Kebab'"), ({"name": None}, "name is None"),
    ({"name": "cqil"}, "of this program's own"), ({"exactness": "exact"}, "no exactness"),
    ({"after": "cqil"}, "expected a tuple of names"), ({"emits": ("a",)}, "expected pairs"),
    ({"breaks": {"weights"}}, "'inputs' and 'outputs'"), ({"Options": int}, "subclass of"),
])  # fmt: skip
def test_a_class_that_declares_nonsense_is_not_even_run(
    declared: dict[str, object], says: str
) -> None:
    broken = type("Broken", (bad_passes.Good,), declared)
    (outcome,) = check(broken)
    assert (outcome.check, outcome.status) == ("class", Status.FAILED)
    assert says in outcome.found


# Another process


def elsewhere_says(pass_class: type[GraphPass[PassOptions]]) -> dict[str, Outcome]:
    found = elsewhere.check_elsewhere(pass_class, [pass_class.Options()])
    return {item.check: item for item in found}


def test_files_that_a_pass_writes_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAD_PASSES_FOLDER", str(tmp_path))
    found = elsewhere_says(bad_passes.Writing)
    assert found["files"].status is Status.FAILED
    assert found["files"].found == f"it does open {tmp_path}/log.txt for writing"
    assert found["import"].status is found["process"].status is Status.PASSED


def test_results_that_depend_on_the_process_are_noticed() -> None:
    found = elsewhere_says(bad_passes.Hashing)
    assert found["process"].status is Status.FAILED
    assert "differs from that of another process" in found["process"].found


def test_a_runtime_that_is_imported_at_once_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorflow.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "heavy.py"
    file.write_text(
        "import tensorflow\nfrom bad_passes import Good\nclass Heavy(Good):\n    pass\n"
    )
    found = elsewhere_says(get_pass(f"{file}:Heavy"))
    assert found["import"].status is Status.FAILED
    assert found["import"].found == "importing it imports tensorflow"


def test_a_class_within_a_function_is_skipped_with_the_reason() -> None:
    class Local(bad_passes.Good):
        pass

    found = elsewhere_says(Local)
    assert {item.status for item in found.values()} == {Status.SKIPPED}
    assert "is not defined at the top of a file" in found["process"].found


# Ways to run it


def test_without_pytest_it_is_one_function(tmp_path: Path) -> None:
    (tmp_path / "pytest.py").write_text("raise ImportError('not installed')\n")
    code = (
        "from optimizer.conformance import conformance_tests\n"
        "from bad_passes import Liar\n"
        "try:\n    conformance_tests(Liar)()\n"
        "except AssertionError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}:{ROOT / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert "failed: invariants, options default, model 'decoder'" in done.stdout


@pytest.mark.usefixtures("one_process")
def test_models_of_the_authors_own_are_tried_too(
    command: Callable[..., Ran], tmp_path: Path
) -> None:
    save_model(models.build(bias=True), tmp_path / "own.onnx")
    spec = f"{bad_passes.__file__}:Good"
    found = command("passes", spec, "--conformance", "--model", tmp_path / "own.onnx", "--json")
    content = json.loads(found.out)
    assert (found.code, content["passed"]) == (0, True)
    assert content["checks"]["runs"]["passed"] == len(MODELS) + 1
    outcomes = list(check(bad_passes.Good, models={"own": lambda: models.build(bias=True)}))
    assert outcomes[-1].found.endswith("rewrites decoder, encoder, vision, parallel, own")


@pytest.mark.usefixtures("one_process")
def test_a_pass_that_fails_ends_with_3_and_says_why(command: Callable[..., Ran]) -> None:
    found = command("passes", f"{bad_passes.__file__}:Liar", "--conformance")
    assert found.code == 3
    assert "failed: invariants, options default, model 'perceptron': pass 'good'" in found.out
    assert found.out.splitlines()[-1] == "the pass does not conform"


@pytest.mark.parametrize(("words", "says"), [
    (["--conformance"], "needs a pass"), (["cqil", "--set", "a=1"], "belong to --conformance"),
    (["cqil", "--conformance", "--set", "first"], "expected OPTION=VALUE"),
    (["cqil", "--conformance", "--set", "frist=1"], "did you mean 'first'?"),
    (["cqil", "--conformance", "--model", "none.onnx"], "no such file"),
])  # fmt: skip
def test_wrong_words_are_refused(command: Callable[..., Ran], words: list[str], says: str) -> None:
    found = command("passes", *words)
    assert found.code == 2
    assert says in found.err
    assert found.out == ""


def test_exactness_of_an_object_may_differ_from_that_of_its_class() -> None:
    assert RemoveOnes().exactness is Exactness.BITWISE
    assert RemoveOnes(RemoveOnes.Options(tolerance=0.1)).exactness is Exactness.APPROXIMATE
