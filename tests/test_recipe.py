"""Recipes: what is accepted, what is refused and how, and that writing one out loses nothing."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, Literal

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from pydantic import Field

from optimizer import recipe as recipes
from optimizer.errors import OptionError, RecipeError
from optimizer.pass_base import Exactness, GraphPass, PassOptions
from optimizer.recipe import load_recipe, make_options, make_recipe, split_passes, to_toml


class DemoOptions(PassOptions):
    group: int = Field(default=2, ge=1)
    first: int | None = Field(default=None, ge=0)
    bypass: int | Literal["symmetric"] = "symmetric"
    ratio: float = 0.5
    enabled: bool = True
    name: str = "x"
    sizes: tuple[int, ...] = ()


class Demo(GraphPass[DemoOptions]):
    name = "demo"
    exactness = Exactness.APPROXIMATE
    Options = DemoOptions


class Late(GraphPass[PassOptions]):
    name = "late"
    exactness = Exactness.BITWISE
    after = ("demo",)


class Later(GraphPass[PassOptions]):
    name = "later"
    exactness = Exactness.BITWISE
    after = ("late", "demo")


class Canonicalize(GraphPass[PassOptions]):
    name = "canonicalize"
    exactness = Exactness.REASSOCIATED


@pytest.fixture(autouse=True)
def demo_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {item.name: item for item in (Demo, Late, Later, Canonicalize)}

    def get_pass(name: str) -> Any:
        if name not in known:
            raise OptionError(f"there is no pass '{name}'")
        return known[name]

    monkeypatch.setattr(recipes, "get_pass", get_pass)


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("", []),
        ("a", ["a"]),
        (" a , b ", ["a", "b"]),
        ("a:x=1;y=2,b", ["a:x=1;y=2", "b"]),
        ("a:x=[1,2],b", ["a:x=[1,2]", "b"]),
    ],
)
def test_a_list_of_passes_is_split_at_commas(text: str, items: list[str]) -> None:
    assert split_passes(text) == items


def test_options_come_inline_by_set_and_from_python() -> None:
    inline = make_recipe(["demo:group=4;bypass=0"])
    by_set = make_recipe(["demo"], overrides=["demo.group=4", "demo.bypass=0"])
    by_python = make_recipe([("demo", {"group": 4, "bypass": 0})])
    assert inline == by_set == by_python
    assert inline.steps[0].options == DemoOptions(group=4, bypass=0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"group": "3"}, {"group": 3}),
        ({"first": "none"}, {"first": None}),
        ({"first": "0"}, {"first": 0}),
        ({"bypass": "2"}, {"bypass": 2}),
        ({"bypass": "symmetric"}, {"bypass": "symmetric"}),
        ({"ratio": "1e-3"}, {"ratio": 1e-3}),
        ({"enabled": "false"}, {"enabled": False}),
        ({"name": "none"}, {"name": "none"}),
        ({"sizes": "[1, 2]"}, {"sizes": (1, 2)}),
    ],
)
def test_text_becomes_the_type_of_the_option(
    given: dict[str, str], expected: dict[str, Any]
) -> None:
    assert make_options(Demo, given) == DemoOptions(**expected)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"grop": "3"}, ["'demo'", "'grop'", "did you mean 'group'?"]),
        ({"group": "x"}, ["'group'", "'x'", "integer"]),
        ({"group": 0}, ["'group'", "0", "greater than or equal to 1"]),
        ({"bypass": "sideways"}, ["'bypass'", "'sideways'", "symmetric"]),
        ({"enabled": "perhaps"}, ["'enabled'", "'perhaps'", "boolean"]),
        ({"sizes": "[1, 2"}, ["'sizes'", "[1, 2"]),
    ],
)
def test_a_wrong_option_is_one_line_that_says_what_was_expected(
    given: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(OptionError) as caught:
        make_options(Demo, given)
    text = str(caught.value)
    assert "\n" not in text
    assert "pydantic" not in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("passes", "overrides", "message"),
    [
        (["demo:group"], [], "expected option=value"),
        ([":x=1"], [], "names no pass"),
        (["demo"], ["demo.group"], "expected PASS.OPTION=VALUE"),
        (["demo"], ["group=3"], "expected PASS.OPTION=VALUE"),
        (["demo"], ["dmo.group=3"], "did you mean 'demo'?"),
        (["nosuch"], [], "no pass 'nosuch'"),
    ],
)
def test_malformed_words_are_refused(passes: list[str], overrides: list[str], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        make_recipe(passes, overrides=overrides)
    assert message in str(caught.value)


def test_a_wrong_order_prints_the_right_one() -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(["later", "late", "demo"])
    assert "--passes demo,late,later" in str(caught.value)


def test_the_right_order_is_accepted() -> None:
    assert [step.name for step in make_recipe(["demo", "late", "later"]).steps] == [
        "demo",
        "late",
        "later",
    ]


def test_canonicalize_is_always_first_and_need_not_be_named() -> None:
    assert make_recipe(["canonicalize", "demo"]).steps == make_recipe(["demo"]).steps
    with pytest.raises(RecipeError, match="always runs first"):
        make_recipe(["demo", "canonicalize"])


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"target": "ort-cpuu"}, ["ort-cpu"]),
        ({"verify": "always"}, ["verify", "each"]),
        ({"kv_cache": "ring"}, ["kv_cache", "append"]),
        ({"samples": 0}, ["samples"]),
        ({"sample": 4}, ["did you mean 'samples'?"]),
        ({"budget": "top1>=x"}, ["top1"]),
        ({"target": "tensorrt-10", "kv_cache": "in-place"}, ["in-place"]),
        ({"opset": 99}, ["opset", "99"]),
    ],
)
def test_wrong_settings_are_refused_before_anything_loads(
    settings: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(OptionError) as caught:
        make_recipe(["demo"], **settings)
    for part in parts:
        assert part in str(caught.value)


def test_a_recipe_written_out_reads_back_equal(tmp_path: Path) -> None:
    first = make_recipe(
        ['demo:group=3;sizes=[4,5];name=a "quoted" näme;ratio=1e-07', "late"],
        target="ort-cpu",
        budget="top1>=0.98,perplexity<=+2%",
        calibration="data/c.npz",
        samples=8,
    )
    path = tmp_path / "r.toml"
    path.write_text(to_toml(first), "utf-8")
    assert load_recipe(path) == first


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.text(st.characters(exclude_categories=["Cs"])),
    ratio=st.floats(allow_nan=False),
    sizes=st.lists(st.integers(-(2**40), 2**40)).map(tuple),
    bypass=st.integers(0, 9) | st.just("symmetric"),
    first=st.none() | st.integers(0, 99),
)
def test_any_options_survive_the_file(
    tmp_path_factory: pytest.TempPathFactory, **options: Any
) -> None:
    path = tmp_path_factory.mktemp("recipe") / "r.toml"
    recipe = make_recipe([("demo", options)])
    path.write_text(to_toml(recipe), "utf-8", newline="")
    assert load_recipe(path) == recipe


def test_settings_given_beside_a_recipe_file_win(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        to_toml(make_recipe(["demo"], samples=8, calibration="a", calibration_sha256="00"))
    )
    changed = load_recipe(path, overrides=["demo.group=7"], samples=2, calibration="b")
    assert changed.settings.samples == 2
    assert changed.settings.calibration_sha256 is None
    assert changed.steps[0].options == DemoOptions(group=7)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("version = 1\npasses = 3", ["[[passes]]"]),
        ("version = 2", ["version is 2", "expected 1"]),
        ("", ["version is None"]),
        ("version = = 1", ["not TOML", "line 1"]),
        ("version = 1\n[[passes]]\ngroup = 2", ["each with a 'pass'"]),
        ('version = 1\n[[passes]]\npass = "demo"\ngrop = 2', ["did you mean 'group'?"]),
        ('version = 1\nverfy = "each"', ["did you mean 'verify'?"]),
    ],
)
def test_a_broken_recipe_file_is_named_with_the_place(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(textwrap.dedent(text))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)


def test_a_missing_recipe_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(tmp_path / "none.toml")
