"""Finding the pass and the rewrite that break a model, with checks that are counted."""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path
from typing import Any

import demo_passes
import models
import onnx_ir as ir
import pytest
import rule_case
from conftest import token_samples
from processor import SATURATES

from optimizer.api import Finding, bisect, optimize
from optimizer.divergence import first_difference
from optimizer.errors import CalibrationError, OptionError
from optimizer.fingerprint import fingerprint
from optimizer.legalize import legalize
from optimizer.legalize import ort_cpu as lowering
from optimizer.model_io import load_model, save_model
from optimizer.progress import start_listening
from optimizer.quantization.scales import Scaling
from optimizer.quantization.sites import Site
from optimizer.raising import norms
from passes import cqil, outliertune

DEMO = Path(demo_passes.__file__)
PRODUCTS = 64
EXACT = "relative_l2<=1e-4"


def demo(*names: str) -> str:
    return ",".join(f"{DEMO}:{name}" for name in names)


def names(finding: Finding) -> list[str]:
    return [item.candidate for item in finding.questions]


def most(stages: int, rewrites: int) -> int:
    """Questions that a search may take: both ends, two halvings, and two more."""
    return 2 + math.ceil(math.log2(stages)) + math.ceil(math.log2(rewrites)) + 2


@pytest.mark.parametrize("site", [0, 1, 17, 31, 32, 62, 63])
@pytest.mark.parametrize("kind", ["Factors", "RoughFactors"])
def test_one_wrong_site_among_many_is_found(kind: str, site: int) -> None:
    passes = f"{demo('Swap')},{demo(kind)}:wrong={site}:1.5,{demo('Nothing')}"
    finding = bisect(models.chain(PRODUCTS), passes, budget=EXACT)
    assert finding.status == "rewrite"
    assert finding.stage == getattr(demo_passes, kind).name
    assert finding.place == (3, 5)
    assert finding.rewrite is not None
    assert (finding.rewrite.site, finding.number, finding.count) == (f"p{site}", site + 1, 64)
    assert finding.bad is not None
    assert "measured 0.5" in finding.bad.reason
    assert finding.alone is not None
    assert finding.alone.is_good(), "nothing else is wrong"
    assert len(finding.questions) <= most(stages=3, rewrites=PRODUCTS)


def test_what_is_claimed_was_tested() -> None:
    finding = bisect(models.chain(PRODUCTS), f"{demo('Factors')}:wrong=20:1.5", budget=EXACT)
    answers = {item.candidate: item.verdict.is_good() for item in finding.questions}
    assert answers["factors, 20 of 64 rewrites"] is True
    assert answers["factors, 21 of 64 rewrites"] is False
    assert answers["factors without p20"] is True
    assert finding.good is not None
    assert finding.good.is_good()
    assert len(answers) == len(finding.questions), "no question is asked twice"


def test_where_the_check_turns_back_and_forth_one_of_the_places_is_found() -> None:
    wrong = {5: 2.0, 20: 0.5, 40: 3.0, 50: 5.0}
    text = ",".join(f"{site}:{factor}" for site, factor in wrong.items())
    passes = [(f"{DEMO}:Factors", {"wrong": text})]
    finding = bisect(models.chain(PRODUCTS), passes, budget=EXACT)
    assert finding.rewrite is not None
    assert finding.rewrite.site in ("p5", "p40", "p50")
    answers = {item.candidate: item.verdict.is_good() for item in finding.questions}
    for candidate, good in answers.items():
        first, _, rest = candidate.removeprefix("factors, ").partition(" ")
        if rest == "of 64 rewrites":
            applied = [factor for site, factor in wrong.items() if site < int(first)]
            assert good is (math.prod(applied) == 1), candidate
    assert finding.alone is not None
    assert not finding.alone.is_good(), "another one is wrong too"


def test_without_a_check_stages_are_proven_as_in_a_run() -> None:
    passes = f"{demo('RoughFactors')}:wrong=3:1.5,{demo('Factors')}:wrong=9:1.5"
    finding = bisect(models.chain(PRODUCTS), passes)
    assert finding.stage == "factors", "an approximate pass may move the numbers"
    assert finding.rewrite is not None
    assert finding.rewrite.site == "p9"
    assert finding.bad is not None
    assert "is off by" in finding.bad.reason


def test_outputs_that_stop_being_finite_are_wrong_after_any_pass() -> None:
    model = models.build()
    data = token_samples()
    finding = bisect(model, demo("Explode"), calibration=data)
    assert (finding.stage, finding.status) == ("explode", "pass")
    assert finding.bad is not None
    assert "not finite" in finding.bad.reason


def test_the_budget_of_a_recipe_is_asked_after_the_proofs(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'version = 1\nbudget = "{EXACT}"\n\n'
        f'[[passes]]\npass = "{DEMO}:RoughFactors"\nwrong = "12:1.5"\n'
    )
    finding = bisect(models.chain(PRODUCTS), recipe=recipe)
    assert finding.rewrite is not None
    assert finding.rewrite.site == "p12"
    assert finding.check.startswith(EXACT)
    assert "after canonicalize" not in names(finding), "it changed nothing"


def test_nothing_broken_is_an_answer() -> None:
    for how in ({}, {"budget": EXACT}):
        finding = bisect(models.chain(PRODUCTS), demo("Factors", "Nothing"), **how)
        assert finding.status == "nothing broken"
        assert finding.stage is None
    finding = bisect(models.chain(PRODUCTS), demo("Nothing"), budget=EXACT)
    assert names(finding) == ["the original model"]
    finding = bisect(models.chain(PRODUCTS), f"{demo('RoughFactors')}:wrong=3:1.5")
    assert finding.status == "nothing broken"
    assert any("add --budget" in remark for remark in finding.remarks)


def test_a_budget_that_the_original_misses_is_refused() -> None:
    with pytest.raises(OptionError, match=r"fails on the original.*<=1: measured"):
        bisect(models.build(), demo("Scale"), budget="perplexity<=1", calibration=token_samples())


def test_a_pass_that_does_not_ask_is_named_with_the_first_value_that_differs() -> None:
    finding = bisect(models.chain(PRODUCTS), f"{demo('SecretFactors')}:wrong=30:1.5", budget=EXACT)
    assert (finding.status, finding.stage) == ("pass", "secret-factors")
    assert any("does not offer its sites" in remark for remark in finding.remarks)
    assert finding.difference is not None
    assert finding.difference.value == "y30"


def test_a_pass_that_is_wrong_outside_of_its_sites_is_named() -> None:
    finding = bisect(models.chain(PRODUCTS), demo("HalfSecretFactors"), budget=EXACT)
    assert (finding.status, finding.stage) == ("pass", "half-secret-factors")
    assert any("even where all 64 sites" in remark for remark in finding.remarks)
    assert finding.difference is not None
    assert finding.difference.value == "y63"


@pytest.mark.parametrize(
    ("kind", "text"), [("FailingFactors", "KeyError"), ("IllegalFactors", "nowhere")]
)
@pytest.mark.parametrize("how", [{}, {"budget": EXACT}, {"check": "true"}])
def test_a_pass_that_fails_at_a_site_is_found_too(
    kind: str, text: str, how: dict[str, str]
) -> None:
    finding = bisect(models.chain(PRODUCTS), f"{demo(kind)}:wrong=11:2", **how)
    assert finding.rewrite is not None
    assert finding.rewrite.site == "p11"
    assert finding.bad is not None
    assert text in finding.bad.reason


def test_a_pass_that_does_not_do_the_same_twice_is_told_on() -> None:
    finding = bisect(models.chain(8), f"{demo('RestlessFactors')}:wrong=3:2", budget=EXACT)
    assert any("took other sites when it ran again" in remark for remark in finding.remarks)


def test_a_check_stricter_than_rounding_is_told_from_a_wrong_pass() -> None:
    finding = bisect(spelled_out(), budget="relative_l2<=1e-9")
    assert finding.stage == "canonicalize"
    assert finding.difference is None
    assert any("more than rounding" in remark for remark in finding.remarks)


def spelled_out(layers: int = 3) -> ir.Model:
    """A language model as exporters of opset 20 write it."""
    model = models.build(layers=layers)
    legalize(model, "tensorrt-10")
    return model


@pytest.mark.parametrize("how", [{}, {"budget": EXACT}])
def test_a_wrong_rule_of_canonicalize_is_named_with_its_site(
    monkeypatch: pytest.MonkeyPatch, how: dict[str, str]
) -> None:
    rule, seen = norms._raise, []

    def wrong(node: ir.Node, **options: Any) -> Any:
        outcome = rule(node, **options)
        if outcome is True:
            seen.append(node.name)
            if node.name == third:
                norm = [n for n in model_of(node) if n.op_type == "RMSNormalization"][2]
                norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1.0)
        return outcome

    def model_of(node: ir.Node) -> ir.Graph:
        assert isinstance(node.graph, ir.Graph)
        return node.graph

    third = [node.name for node in spelled_out().graph if node.op_type == "Sqrt"][2]
    monkeypatch.setattr(norms, "_raise", wrong)
    finding = bisect(spelled_out(), **how)
    assert finding.stage == "canonicalize"
    assert finding.rewrite is not None
    assert (finding.rewrite.site, finding.rewrite.rule) == (third, "norms")
    assert finding.change.endswith("-> RMSNormalization")
    assert "Sqrt" in finding.change
    assert finding.difference is not None
    assert finding.difference.operator == "RMSNormalization, before Mul"
    assert len(finding.questions) <= most(stages=2, rewrites=finding.count)


def test_a_wrong_lowering_is_told_from_the_pass_before(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = lowering.decompose.attention

    def wrong(pen: Any) -> None:
        pen.node.attributes["scale"] = ir.AttrFloat32("scale", 2.0)
        rule(pen)

    monkeypatch.setattr(lowering.decompose, "attention", wrong)
    data = token_samples()
    finding = bisect(models.build(), demo("Swap"), budget=EXACT, calibration=data)
    assert (finding.stage, finding.place) == ("legalize", (3, 3))
    assert finding.rewrite is not None
    assert finding.rewrite.rule == "causal attention"
    assert finding.number == 1


def test_a_wrong_scale_of_outliertune_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build(layers=3)
    choose = outliertune.choose
    chosen: list[str] = []

    def wrong(site: Site, *arguments: Any) -> Scaling:
        scaling = choose(site, *arguments)
        chosen.append(site.name)
        if len(chosen) == 7:
            scaling = outliertune.replace(scaling, step=scaling.step * 40)
        return scaling

    monkeypatch.setattr(outliertune, "choose", wrong)
    finding = bisect(
        model,
        "outliertune:heads=false",
        budget=f"relative_l2<={0.2 if SATURATES else 0.05}",
        calibration=token_samples(),
        each=True,
    )
    assert len(chosen) == 12, "decisions are made once"
    assert finding.stage == "outliertune"
    assert finding.rewrite is not None
    wrong_site = "layers.1.up.weight and 1 more"
    assert (finding.rewrite.site, finding.number) == (wrong_site, 7)
    assert finding.alone is not None
    assert finding.alone.is_good()
    assert len(finding.questions) <= most(stages=3, rewrites=12)
    assert finding.shares[0].rewrite.site == wrong_site
    assert len({share.rewrite.site for share in finding.shares}) == 12
    damages = [share.damage for share in finding.shares]
    assert damages == sorted(damages, reverse=True)
    assert damages[0] > (5 if SATURATES else 10) * damages[1]


def test_groups_of_cqil_are_those_of_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build(layers=6, zero_layers=(0, 1))
    whole = optimize(model, "cqil:depth=3", calibration=token_samples()).report.rows[1]
    search, searches = cqil._automatic, []

    def counted(*arguments: Any) -> Any:
        searches.append(1)
        return search(*arguments)

    monkeypatch.setattr(cqil, "_automatic", counted)
    finding = bisect(
        model,
        "cqil:depth=3",
        budget="relative_l2<=0.02",
        calibration=token_samples(),
        each=True,
    )
    assert finding.stage == "cqil"
    assert finding.rewrite is not None
    groups = [f"layers {first}-{last}" for first, *_, last in whole.details["groups"]]
    assert {share.rewrite.site for share in finding.shares} == set(groups)
    assert finding.rewrite.site in groups
    assert len(groups) == finding.count > 1
    assert len(searches) == 1, "the partition is searched once"


def test_each_without_approximate_passes_says_so() -> None:
    finding = bisect(models.chain(PRODUCTS), demo("Factors"), budget=EXACT, each=True)
    assert not finding.shares
    assert any("there is none here" in remark for remark in finding.remarks)


def test_the_original_in_memory_and_on_disk_stay_as_they_are(tmp_path: Path) -> None:
    model, path = models.chain(PRODUCTS), tmp_path / "chain.onnx"
    save_model(model, path)
    before = path.read_bytes(), ir.to_proto(model).SerializeToString(deterministic=True)
    for source in (path, model):
        bisect(source, f"{demo('Factors')}:wrong=5:2", budget=EXACT)
    after = path.read_bytes(), ir.to_proto(model).SerializeToString(deterministic=True)
    assert before == after
    assert [item.name for item in tmp_path.iterdir()] == ["chain.onnx"]
    load_model(path)


def test_wrong_use_is_refused_before_anything_runs() -> None:
    for how, text in (
        ({"check": "true", "budget": EXACT}, "not by both"),
        ({"timeout": 3}, "--timeout"),
        ({"check": ""}, "empty"),
        ({"check": "'open"}, "cannot be read"),
        ({"check": "no-such-program x"}, "'no-such-program' cannot be started"),
        ({"budget": ""}, "no limit"),
        ({"budget": "speed<=1"}, "no metric"),
    ):
        with pytest.raises(OptionError, match=text):
            bisect(Path("no-such-model.onnx"), demo("Factors"), **how)
    with pytest.raises(CalibrationError, match="--calibration"):
        bisect(models.chain(PRODUCTS), "outliertune", budget=EXACT)


def test_a_difference_that_is_made_up_for_is_not_the_first() -> None:
    """A value that is scaled and scaled back later is not where the numbers break."""
    text = "a = Mul(x, two) b = Mul(a, half) c = Add(b, one) y = Neg(c)"
    held = "float two = {2}, float half = {0.5}, float one = {1}"
    right = rule_case.graph(text, constants=held)
    wrong = rule_case.graph(
        text, constants="float two = {4}, float half = {0.25}, float one = {1.5}"
    )
    found = first_difference(right, wrong)
    assert found is not None
    assert (found.value, found.operator) == ("c", "Add")
    assert found.method == "both in float64"
    assert first_difference(right, right.clone()) is None


def test_a_change_is_told_by_operators() -> None:
    held = "float two = {2}, float half = {0.5}"
    one = rule_case.graph("a = Mul(x, two) b = Mul(a, half) y = Neg(b)", constants=held)
    cases = {
        "a = Exp(x) b = Add(a, half) y = Neg(b)": "2 Mul -> Exp, Add",
        "a = Mul(x, two) y = Neg(a)": "Mul fewer",
        "a = Mul(x, two) b = Mul(a, half) c = Abs(b) y = Neg(c)": "Abs more",
        "a = Mul(two, x) b = Mul(a, half) y = Neg(b)": "other inputs, outputs or attributes of Mul",
        "a = Mul(x, two) b = Mul(a, half) y = Neg(b)": "",
    }
    for text, change in cases.items():
        other = rule_case.graph(text, constants=held)
        for model in (one, other):
            for node in model.graph:
                node.name = f"{node.outputs[0].name}/node"
        found = fingerprint(one).change(fingerprint(other))
        assert found.startswith(change), found
        assert bool(found) == bool(change)


def test_names_with_brackets_can_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with start_listening(quiet=False, verbose=False) as listener:
        listener.stage("pass: [/layers.0] alone")
        listener.note("after [/layers.0]: [red]good")
        assert "after [/layers.0]: [red]good" in sys.stderr.getvalue()  # type: ignore[attr-defined]
