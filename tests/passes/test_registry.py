"""Finding passes: by name, in a file, from installed distributions; and every way to fail at it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome

import passes
from optimizer.errors import MissingDependencyError, OptionError, RecipeError
from optimizer.external_passes import origin
from optimizer.recipe import load_recipe, make_recipe, to_toml
from passes.canonicalize import Canonicalize

OWN = """\
from __future__ import annotations
from typing import Literal
from pydantic import Field
from optimizer.pass_base import Context, Exactness, GraphPass, PassOptions, Report

class MineOptions(PassOptions):
    kind: Literal["plain", "fancy"] = Field("plain", description="How.")

class Mine(GraphPass[MineOptions]):
    name = "mine"
    exactness = Exactness.BITWISE
    Options = MineOptions
    def call(self, model, context):
        return Report(modified=False)

class Second(Mine):
    name = "mine"

NotOne = 3
an_object = Mine()
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def variant(tmp_path: Path, body: str, name: str = "broken.py") -> str:
    """A file with the pass of ``OWN`` and something more."""
    (tmp_path / name).write_text(OWN + body)
    return f"{tmp_path / name}:Broken"


# By name


def test_a_pass_is_found_by_its_name() -> None:
    assert passes.get_pass("canonicalize") is Canonicalize


def test_names_are_known_without_importing_a_pass() -> None:
    code = "import passes, sys; print(passes.PASS_NAMES); sys.exit('onnx_ir' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "canonicalize" in done.stdout


@pytest.mark.parametrize(
    ("name", "hint"), [("cannonicalize", "did you mean 'canonicalize'?"), ("zzz", "known passes: ")]
)
def test_an_unknown_name_is_an_option_error_with_help(name: str, hint: str) -> None:
    with pytest.raises(OptionError, match=f"there is no pass '{name}'") as caught:
        passes.get_pass(name)
    assert hint in str(caught.value)


# In a file


def test_a_class_in_a_file_is_a_pass(own: Path) -> None:
    found = passes.get_pass(f"{own}:Mine")
    assert found.name == "mine"
    # Its annotations are texts, which pydantic looks up in the registered module.
    assert found.Options(kind="fancy").kind == "fancy"
    assert passes.get_pass(f"{own}:Mine") is found
    assert list(own.parent.iterdir()) == [own]


def test_two_files_of_one_name_and_a_changed_file_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.py").write_text(OWN.replace('"mine"', f'"from-{folder}"'))
    specs = [f"{tmp_path}/{folder}/own.py:Mine" for folder in ("a", "b")]
    assert [passes.get_pass(spec).name for spec in specs] == ["from-a", "from-b"]
    (tmp_path / "a/own.py").write_text(OWN.replace('"mine"', '"changed"'))
    assert passes.get_pass(specs[0]).name == "changed"


#: what follows the good part of the file, what the message must say
BROKEN_FILES = {
    "syntax": ("\nclass Broken(:\n", "broken.py:22: SyntaxError: invalid syntax"),
    "import": ("\nimport nowhere_at_all\n", "broken.py:22: ModuleNotFoundError: No module named"),
    "sibling": ("\nimport helper\n", "put that folder on the path: PYTHONPATH="),
    "raises": ("\nBroken = {}['key']\n", "broken.py:22: KeyError: 'key'; correct the file"),
    "deeper": ("\nimport json\njson.loads('no')\n", "broken.py:23: JSONDecodeError: Expecting"),
    "ends": ("\nraise SystemExit\n", "broken.py:22: SystemExit: without a message"),
    "name": ("\nclass Broken(Mine):\n    name = 'Not Kebab'\n", "'Not Kebab', expected lower-case"),
    "no name": ("\nclass Broken(GraphPass):\n    exactness = Exactness.BITWISE\n"
                "    call = Mine.call\n", "Broken.name is None"),
    "clash": ("\nclass Broken(Mine):\n    name = 'cqil'\n", "a name of this program's own; choose"),
    "exactness": ("\nclass Broken(Mine):\n    exactness = 'bitwise'\n", "declares no exactness"),
    "call": ("\nclass Broken(GraphPass):\n    name = 'b'\n    exactness = Exactness.BITWISE\n",
             "Broken does not define call"),
    "options": ("\nclass Broken(Mine):\n    Options = dict\n", "expected a subclass of"),
    "thawed": ("\nclass Broken(Mine):\n    class Options(PassOptions, frozen=False): ...\n",
               "must stay frozen"),
    "required": ("\nclass Broken(Mine):\n    class Options(PassOptions):\n        n: int\n",
                 "option 'n' has no default"),
    "init": ("\nclass Broken(Mine):\n    def __init__(self, a, b): ...\n",
             "cannot be created with its default options: TypeError"),
    "after": ("\nclass Broken(Mine):\n    after = 'cqil'\n", "expected a tuple of names"),
    "function": ("\ndef Broken(model: ir.Model): ...\n", "a function takes a gs.Graph"),
    "null": ("\n\0\n", "null bytes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_whatever_is_wrong_with_a_file_is_said_with_its_line(tmp_path: Path, kind: str) -> None:
    body, says = BROKEN_FILES[kind]
    (tmp_path / "helper.py").touch()
    before = set(sys.modules)
    with pytest.raises(OptionError) as caught:
        passes.get_pass(variant(tmp_path, body))
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"pass '{tmp_path}/broken.py:Broken': ")
    assert len(str(caught.value).splitlines()) == 1
    if kind in ("import", "raises", "ends"):
        assert not {name for name in set(sys.modules) - before if "optimizer_pass" in name}


@pytest.mark.parametrize(("name", "says"), [
    ("own.py:Other", "defines no 'Other'; it defines MineOptions, Mine, Second"),
    ("own.py:Mien", "did you mean 'Mine'?"), ("own.py:NotOne", "it is 3, expected a subclass"),
    ("own.py:an_object", "name the class itself"), ("own.py:MineOptions", "expected a subclass"),
    ("missing.py:Mine", "cannot be read: No such file"), ("own.py", "which part of the file?"),
])  # fmt: skip
def test_a_file_without_such_a_pass_is_an_option_error(own: Path, name: str, says: str) -> None:
    with pytest.raises(OptionError, match="pass '") as caught:
        passes.get_pass(f"{own.parent}/{name}")
    assert says in str(caught.value)


def test_a_broken_file_ends_the_command_with_2_and_a_traceback_only_on_request(
    command: Callable[..., Outcome], small: Path, tmp_path: Path
) -> None:
    spec = variant(tmp_path, "\nBroken = 1 / 0\n")
    found = command(small, "--passes", spec)
    assert (found.code, found.out) == (2, "")
    assert found.lines == [
        f"optimize: pass '{spec}': {tmp_path}/broken.py:22: ZeroDivisionError: division by zero; "
        "correct the file"
    ]
    assert "Traceback" in command(small, "--passes", spec, "-v").err


@pytest.mark.parametrize(("statement", "says"), [
    ("raise RuntimeError('odd')", "RuntimeError: odd"), ("raise SystemExit(7)", "SystemExit: 7"),
    ("1 / 0", "ZeroDivisionError"), ("open('/none/x')", "FileNotFoundError"),
])  # fmt: skip
def test_a_pass_that_fails_while_it_runs_is_blamed_with_its_line(
    command: Callable[..., Outcome], small: Path, tmp_path: Path, statement: str, says: str
) -> None:
    body = f"\nclass Broken(Mine):\n    def call(self, model, context):\n        {statement}\n"
    found = command(small, "--passes", variant(tmp_path, body))
    assert found.code == 1
    assert f"pass 'mine' failed at broken.py:24: {says}" in found.err
    assert "this is a defect of the pass" in found.err


# From an installed distribution


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Install a distribution that registers passes, as pip would leave it."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def run(name: str, points: dict[str, str], module: str = OWN, version: str = "1.2") -> Path:
        package = name.replace("-", "_")
        (site / f"{package}.py").write_text(module)
        for old in site.glob(f"{package}-*.dist-info"):
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
        folder = site / f"{package}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
        lines = [f"{key} = {package}:{value}" for key, value in points.items()]
        (folder / "entry_points.txt").write_text("\n".join(["[optimizer.passes]", *lines]))
        monkeypatch.delitem(sys.modules, package, raising=False)
        return site

    return run


def test_installed_distributions_add_passes(
    install: Callable[..., Path], command: Callable[..., Outcome], small: Path
) -> None:
    install("acme-passes", {"mine": "Mine"})
    assert passes.get_pass("mine").name == "mine"
    assert passes.all_names()[-1] == "mine"
    listed = json.loads(command("passes", "--json").out)
    assert [item["name"] for item in listed] == [*passes.PASS_NAMES, "mine"]
    found = json.loads(command(small, "--passes", "mine:kind=fancy", "--json").out)
    assert found["report"]["passes"][1]["pass"] == "mine"
    assert found["recipe"]["passes"][0]["distribution-version"] == "acme-passes 1.2"


#: entry points, what the message must say
BROKEN_POINTS = {
    "gone": ({"mine": "Gone"}, OWN, "entry point 'mine' of distribution 'acme-passes' cannot be"),
    "import": ({"mine": "Mine"}, "import nowhere_at_all\n", "ModuleNotFoundError: No module named"),
    "syntax": ({"mine": "Mine"}, "class (:\n", "cannot be loaded: SyntaxError"),
    "ends": ({"mine": "Mine"}, "raise SystemExit(3)\n", "cannot be loaded: SystemExit"),
    "kind": ({"mine": "NotOne"}, OWN, "it is 3, expected a subclass"),
    "other name": ({"yours": "Mine"}, OWN, "loads a pass called 'mine'; both names must be"),
}


@pytest.mark.parametrize("kind", BROKEN_POINTS)
def test_a_broken_entry_point_is_listed_as_such_and_breaks_nothing_else(
    install: Callable[..., Path], command: Callable[..., Outcome], small: Path, kind: str
) -> None:
    points, module, says = BROKEN_POINTS[kind]
    install("acme-passes", points, module)
    (name,) = points
    listed = command("passes")
    assert listed.code == 0
    (line,) = [line for line in listed.out.splitlines() if line.startswith(f"{name} ")]
    assert "cannot be used: " in line
    assert says in line
    content = json.loads(command("passes", "--json").out)
    assert says in content[-1]["error"]
    explained = command("passes", name)
    assert (explained.code, explained.out) == (2, "")
    assert says in explained.err
    assert command(small, "-q").code == 0


def test_names_that_are_taken_are_reported(
    install: Callable[..., Path], command: Callable[..., Outcome]
) -> None:
    install("acme-passes", {"mine": "Mine", "cqil": "Mine"})
    install("other-passes", {"mine": "Mine"})
    with pytest.raises(OptionError, match=r"by distribution '.*' and distribution '.*'; uninstall"):
        passes.get_pass("mine")
    assert passes.get_pass("cqil").__module__ == "passes.cqil"
    listed = command("passes").out.splitlines()
    assert [line.split()[0] for line in listed].count("cqil") == 2
    assert any("registers it too, which has no effect" in line for line in listed)


# What a recipe keeps of them


def test_a_recipe_keeps_what_identifies_the_code_and_notices_a_change(
    own: Path, command: Callable[..., Outcome], small: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.toml"
    words = (small, "-o", tmp_path / "a.onnx", "--force")
    assert command(*words, "--passes", f"{own}:Mine", "--save-recipe", recipe).code == 0
    assert f'file-sha256 = "{origin(f"{own}:Mine")["file-sha256"]}"' in recipe.read_text()
    same = command(*words, "--recipe", recipe)
    assert same.code == 0
    assert "is not what the recipe was written with" not in same.err
    own.write_text(OWN + "\n# another comment\n")
    changed = command(*words, "--recipe", recipe)
    assert changed.code == 0
    assert f"pass '{own}:Mine' is not what the recipe was written with" in changed.err


def test_a_recipe_notices_another_version_of_a_distribution(
    install: Callable[..., Path], tmp_path: Path
) -> None:
    install("acme-passes", {"mine": "Mine"})
    (tmp_path / "r.toml").write_text(to_toml(make_recipe(["mine"])))
    install("acme-passes", {"mine": "Mine"}, version="1.3")
    (step,) = load_recipe(tmp_path / "r.toml").steps
    assert step.recorded == {"distribution-version": "acme-passes 1.2"}
    assert step.origin == {"distribution-version": "acme-passes 1.3"}


def test_two_passes_of_one_name_are_refused(own: Path) -> None:
    assert len(make_recipe([f"{own}:Mine", f"{own}:Mine"]).steps) == 2
    with pytest.raises(RecipeError, match="are both called 'mine'; rename one"):
        make_recipe([f"{own}:Mine", f"{own}:Second"])


def test_passes_that_need_no_canonical_graph_may_come_before_canonicalize(tmp_path: Path) -> None:
    raw = variant(tmp_path, "\nclass Broken(Mine):\n    name = 'raw'\n    canonical = False\n")
    steps = make_recipe([raw, "canonicalize", "cqil:first=0"]).steps
    assert [step.name for step in steps] == ["raw", "canonicalize", "cqil"]
    mine = f"{tmp_path}/broken.py:Mine"
    with pytest.raises(RecipeError, match=r"first, so leave it out \('mine' reads what it makes\)"):
        make_recipe([raw, mine, "canonicalize"])


def test_graphsurgeon_that_is_missing_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx_graphsurgeon", None)
    (tmp_path / "fix.py").write_text("import onnx_graphsurgeon as gs\ndef fix(graph): ...\n")
    with pytest.raises(MissingDependencyError, match=r"pip install optimize-onnx\[graphsurgeon\]"):
        passes.get_pass(f"{tmp_path}/fix.py:fix")
