"""The shape of the code base: layers, sizes, registration of passes, documentation of options."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from optimizer.external_passes import HEADINGS
from optimizer.pass_base import PassOptions
from passes import PASS_NAMES, get_pass

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*(ROOT / "optimizer").rglob("*.py"), *(ROOT / "passes").rglob("*.py")])

#: A module imports only from rows above, and within its row from modules to its left. A package
#: counts as one module; its parts may import each other.
LAYERS = [
    row.split()
    for row in (
        "errors",
        "machine metrics inputs sample_sources samples feeds probes deviation targets memory "
        "arrays hashing listener onnx_wire gate halving sparse_cost custom_ops elf environment "
        "diagnosis",
        "data_files graph nodes proto half_weights segments fingerprint structure norm_parts "
        "quantized_parts block_parts special_parts blocks linear_layers raising attention_masks "
        "widening fusion checks model_tensors sparse_input notes model_functions proto_text "
        "model_input model_writer "
        "model_io frontends engines runners",
        "observers calibration pass_base graphsurgeon external_passes quantization pruning "
        "precision sparse_layers sparse_replacement tokens generation legalize",
        "passes pass_template",
        "budget recipe provenance report footprint verify pipeline operands benchmark export "
        "inspection token_picture "
        "comparison divergence judges command_judge stages shares bisection "
        "conformance",
        "progress job bisect_job api engine_check engine_job bundle_job engine_inspection "
        "cli __main__",
    )
]
#: Where these may be imported; everything else works without them.
RUNTIMES = {
    "onnxruntime": ("optimizer/runners/", "optimizer/frontends/"),
    "torch": ("optimizer/frontends/",),
    "transformers": ("optimizer/frontends/",),
    "onnxscript": ("optimizer/frontends/",),
    "tensorrt": ("optimizer/runners/", "optimizer/engines/", "optimizer/export/jetson/"),
    "onnx_graphsurgeon": ("optimizer/graphsurgeon/",),
    "click": ("optimizer/cli/",),
    "rich": ("optimizer/cli/", "optimizer/progress.py"),
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    """The name in ``LAYERS``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "passes" if parts[0] == "passes" else parts[1]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imported(path: Path) -> Iterator[str]:
    """Dotted names, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)} uses a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def place(module: str) -> tuple[int, int]:
    for row, modules in enumerate(LAYERS):
        if module in modules:
            return row, modules.index(module)
    pytest.fail(f"module '{module}' has no place in LAYERS: give it one")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_module_imports_only_what_is_above_or_left_of_it(path: Path) -> None:
    own = module_of(path)
    if own == "__init__":
        return
    for name in imported(path):
        first, *rest = name.split(".")
        if first == "passes":
            other = "passes"
            siblings = [part for part in rest[:1] if (ROOT / "passes" / f"{part}.py").exists()]
            assert own != "passes" or not siblings, f"a pass imports another: {name}"
        elif first == "optimizer" and rest and rest[0] != "__version__":
            other = rest[0]
        else:
            continue
        assert other == own or place(other) < place(own), f"{own} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_runtimes_are_imported_only_where_they_belong(path: Path) -> None:
    for name in imported(path):
        allowed = RUNTIMES.get(name.split(".")[0])
        assert allowed is None or relative(path).startswith(allowed), name


def test_the_package_itself_holds_only_the_version() -> None:
    body = [n for n in tree(ROOT / "optimizer" / "__init__.py").body if isinstance(n, ast.stmt)]
    assert len(body) == 2, "docstring and __version__"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_file_has_at_most_400_lines(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_function_has_at_most_40_statements(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            count = sum(isinstance(inner, ast.stmt) for inner in ast.walk(node)) - 1
            assert count <= 40, f"{node.name} has {count}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(tree(path))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_only_the_command_prints(path: Path) -> None:
    if relative(path).startswith("optimizer/cli/"):
        return
    for node in ast.walk(tree(path)):
        is_print = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
        assert not is_print, f"line {node.lineno}"


def test_every_pass_file_is_registered_and_the_reverse() -> None:
    files = {path.stem.replace("_", "-") for path in (ROOT / "passes").glob("[!_]*.py")}
    assert files == set(PASS_NAMES)


@pytest.mark.parametrize("name", PASS_NAMES)
def test_a_pass_is_documented_and_its_options_are(name: str) -> None:
    pass_class = get_pass(name)
    text = inspect.getdoc(sys.modules[pass_class.__module__]) or ""
    for heading in HEADINGS:
        assert re.search(rf"^{heading}", text, re.MULTILINE), f"{name} lacks {heading}"
    assert issubclass(pass_class.Options, PassOptions)
    assert pass_class.Options.model_config["frozen"]
    for option, info in pass_class.Options.model_fields.items():
        assert info.description, f"{name}.{option} has no description"
        assert not info.is_required(), f"{name}.{option} has no default"
    assert set(pass_class.after) <= set(PASS_NAMES)


def test_the_canonical_order_of_passes_is_allowed_by_each() -> None:
    for index, name in enumerate(PASS_NAMES):
        assert not set(get_pass(name).after) & set(PASS_NAMES[index + 1 :])


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from optimizer.cli import run_command; run_command(['--help']);"
        "print(sorted({'numpy','onnx','onnx_ir','pydantic','rich','torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip().endswith("[]")
