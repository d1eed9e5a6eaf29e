"""Everything a user can get wrong: the right exit code, at most four clear lines, nothing left.

``error_cases.py`` holds the list, which is the README's; here are the test of each row, variants of
some, and the proof that nothing in the program refuses without a row.
"""

from __future__ import annotations

import ast
import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import error_cases
import models
import numpy as np
import onnx.helper as oh
import pytest
from conftest import Outcome, token_samples
from error_cases import ANSWERS, DEMO, INTERNAL, ROWS, SCALE, VARIANTS, Place, Row, graph

from optimizer import errors
from optimizer.model_io import save_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def refused(command: Callable[..., Outcome], tmp_path: Path) -> Callable[..., Outcome]:
    """Run the command and check all that holds for every refusal."""

    def run(code: int, *words: Any, says: tuple[str, ...] = ()) -> Outcome:
        before = {item: item.read_bytes() for item in tmp_path.rglob("*") if item.is_file()}
        found = command(*words)
        assert found.code == code, found.err
        assert found.out == ""
        assert found.lines[0].startswith("optimize: ") or "data: " in found.lines[0]
        assert 1 <= len(found.lines) <= 4
        assert all(line.isprintable() for line in found.lines)
        assert "Traceback" not in found.err
        for part in says:
            assert part in found.err
        after = {item: item.read_bytes() for item in tmp_path.rglob("*") if item.is_file()}
        assert after == before
        return found

    return run


@pytest.fixture
def place(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, small, monkeypatch)


@pytest.fixture
def raised(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the functions that raise an error of ours, or one of the command line."""
    found: set[str] = set()
    for kind in (errors.OptimizerError, click.ClickException):
        monkeypatch.setattr(kind, "__init__", _noting(kind.__init__, found))
    return found


def _noting(init: Callable[..., None], found: set[str]) -> Callable[..., None]:
    def note(self: Any, *words: Any, **options: Any) -> None:
        frame = sys._getframe(1)
        while frame.f_code.co_name == "__init__" and frame.f_back is not None:
            frame = frame.f_back
        module = frame.f_globals["__name__"].removeprefix("optimizer.")
        found.add(f"{module}.{frame.f_code.co_qualname}")
        init(self, *words, **options)

    return note


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_the_program_refuses(
    refused: Callable[..., Outcome], place: Place, raised: set[str], row: Row
) -> None:
    words = row.do(place)
    raised.clear()
    refused(row.code, *words, says=row.says)
    assert set(row.raised_by) <= raised


@pytest.mark.parametrize("row", ANSWERS, ids=lambda row: row.id)
def test_the_program_answers(command: Callable[..., Outcome], place: Place, row: Row) -> None:
    found = command(*row.do(place))
    assert found.code == row.code
    assert all(part in found.out for part in row.says)


def _raising() -> Iterator[str]:
    """The functions of the program in which an error for the user is raised."""
    names = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.OptimizerError)
    } | {"BadParameter", "UsageError"}
    for path in (*ROOT.glob("optimizer/**/*.py"), *ROOT.glob("passes/*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts).removeprefix("optimizer.").removesuffix(".__init__")
        pending = [(ast.parse(path.read_text("utf-8")), "")]
        while pending:
            node, where = pending.pop()
            for child in ast.iter_child_nodes(node):
                inner = where
                if isinstance(child, ast.FunctionDef | ast.ClassDef):
                    inner = f"{where}.{child.name}"
                elif isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
                    called = child.exc.func
                    if getattr(called, "id", getattr(called, "attr", "")) in names:
                        yield f"{module}{where}"
                pending.append((child, inner))


def test_every_function_that_refuses_has_a_row() -> None:
    functions = set(_raising())
    known = {name for row in ROWS for name in row.raised_by} | set(VARIANTS)
    assert functions - known == set(), "give them a row in error_cases.py"
    assert set(VARIANTS) <= functions, "these refuse no more"
    assert set(VARIANTS.values()) <= {INTERNAL, *(row.what for row in ROWS)}


def test_the_readme_holds_the_table_of_errors_as_it_is_tested() -> None:
    """``python tests/error_cases.py`` prints it."""
    text = (ROOT / "README.md").read_text("utf-8")
    found = re.search(r"<!-- errors: begin -->\n(.*?)\n<!-- errors: end -->", text, re.DOTALL)
    assert found is not None
    assert found[1].splitlines() == list(error_cases.table())


def test_every_exit_code_of_the_table_is_explained() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    explained = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    assert {row.code for row in ROWS} | {0} <= explained
    documented = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert documented == explained


# Variants.


def test_every_command_refuses_a_junk_file(refused: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"this is not a model\n" * 100)
    for words in (["inspect"], ["bench"]):
        refused(2, *words, tmp_path / "m.onnx", says=("not an ONNX model",))
    refused(2, "check", tmp_path / "m.onnx", tmp_path / "m.onnx", says=("not an ONNX model",))


def test_an_empty_file(refused: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "m.onnx").touch()
    refused(2, tmp_path / "m.onnx", says=("is empty",))
    refused(2, ".", says=("is a folder",))


def test_a_dangling_input(refused: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(graph([oh.make_node("MatMul", ["x", "gone"], ["y"])]))
    refused(2, tmp_path / "m.onnx", says=("'gone'",))


def test_options_of_passes_in_the_other_spelling(
    refused: Callable[..., Outcome], small: Path
) -> None:
    refused(2, small, "--passes", SCALE, "--set", "scale.fctor=2", says=("'factor'",))


WRONG_DATA: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "wrong name": ({"input_idz": token_samples()["input_ids"]}, "expected"),
    "missing name": ({"other": np.zeros((2, 3))}, "none of the model's inputs"),
    "NaN": (
        {**token_samples(2, 4), "past_key_values.0.key": np.full((2, 2, 1, 8), np.nan, np.float32)},
        "NaN",
    ),
    "empty": ({"input_ids": np.zeros((0, 4), np.int64)}, "no samples"),
    "negative": ({"input_ids": np.full((2, 4), -1)}, "0..49"),
}


@pytest.mark.parametrize("kind", WRONG_DATA)
@pytest.mark.parametrize("option", ["--calibration", "--eval"])
def test_data_that_does_not_fit(
    refused: Callable[..., Outcome], tmp_path: Path, kind: str, option: str
) -> None:
    save_model(models.build(kv_cache=True), tmp_path / "m.onnx")
    arrays, part = WRONG_DATA[kind]
    np.savez(tmp_path / "data.npz", **arrays)
    words = (tmp_path / "m.onnx", "--passes", SCALE, option, tmp_path / "data.npz")
    refused(2, *words, says=(option, part))


def test_data_that_cannot_be_read(refused: Callable[..., Outcome], small: Path) -> None:
    junk = small.with_name("junk.npz")
    junk.write_bytes(b"junk")
    refused(2, small, "--passes", SCALE, "--calibration", junk, says=("junk.npz",))


def test_an_output_that_links_to_the_input(refused: Callable[..., Outcome], small: Path) -> None:
    (small.parent / "link.onnx").symlink_to(small)
    refused(2, small, "-o", small.parent / "link.onnx", "--force", says=("never overwritten",))


def test_a_default_output_that_exists(refused: Callable[..., Outcome], small: Path) -> None:
    small.with_name("small.opt.onnx").write_text("precious")
    refused(2, small, says=("--force",))
    small.with_name("small.opt.onnx").unlink()
    small.with_name("small.opt.onnx.manifest.json").symlink_to("nowhere")
    refused(2, small, says=("manifest.json exists", "--force"))


def test_a_full_disk_with_external_data(refused: Callable[..., Outcome], place: Place) -> None:
    words = error_cases.full_disk(place)
    refused(1, *words, "--external-data", "always", says=("No space left", "nothing was kept"))


def test_a_disk_that_fills_up_while_the_manifest_is_written(
    refused: Callable[..., Outcome], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_ = Path.open

    def full(path: Path, *words: Any, **options: Any) -> Any:
        if "manifest" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return open_(path, *words, **options)

    monkeypatch.setattr(Path, "open", full)
    refused(1, small, says=("No space left on device", "nothing was kept"))


def test_a_file_size_limit_of_the_system(small: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    before = sorted(small.parent.iterdir())
    done = subprocess.run(
        [sys.executable, "-m", "optimizer", str(small), "--verify", "off", "-q"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        preexec_fn=limit,
        env={"PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == errors.EXIT_INTERNAL
    assert "could not be written" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 4
    assert sorted(small.parent.iterdir()) == before


def test_a_folder_that_may_not_be_written_to(
    refused: Callable[..., Outcome], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by its permissions: root may write everywhere."""
    open_ = Path.open

    def denied(path: Path, mode: str = "r", *words: Any, **options: Any) -> Any:
        if "x" in mode:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return open_(path, mode, *words, **options)

    monkeypatch.setattr(Path, "open", denied)
    refused(1, small, says=("Permission denied", "choose another folder"))


def test_a_missing_recipe(refused: Callable[..., Outcome], small: Path) -> None:
    refused(2, small, "--recipe", small.with_name("r.toml"), says=("r.toml",))


def test_a_missing_runtime_names_the_extra(
    refused: Callable[..., Outcome], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused(6, small, says=("pip install",))


def test_ctrl_c_while_data_is_made(refused: Callable[..., Outcome], small: Path) -> None:
    words = (small, "--passes", f"{DEMO}:Interrupted", "--calibration", "self", "--samples", 1)
    refused(130, *words, says=("interrupted",))
