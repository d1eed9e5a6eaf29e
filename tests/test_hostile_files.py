"""Files made to hurt: nothing outside of their folder is touched, nothing is waited for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fuzzing import hostile
from fuzzing.files import FLOAT, Hostile, Special, aimed, holding
from fuzzing.files import OUTSIDE as FOREIGN
from fuzzing.sandbox import Sandbox
from refusals import refusal

from optimizer.cli import run_command
from optimizer.model_io import external_files, load_model, save_model
from optimizer.pass_base import Context
from optimizer.runners.ort import OrtRunner
from passes.canonicalize import Canonicalize

X = np.arange(4, dtype=np.float32)
PLACES = ("initializer", "branch", "attribute", "function", "list", "unused")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Hostile], Path]:
    """Write a model into a folder of its own, beside one that holds a secret."""
    folder, outside = tmp_path / "models" / "in", tmp_path / "models" / "outside"
    for item in (folder, outside, tmp_path / "here"):
        item.mkdir(parents=True)
    (outside / "secret.bin").write_bytes(X.tobytes())
    (tmp_path / "here" / "data.bin").write_bytes(b"another file of this name")
    monkeypatch.chdir(tmp_path / "here")

    def write(made: Hostile) -> Path:
        for name, content in made.files.items():
            _write(folder / name, content, outside)
        path = folder / "model.onnx"
        path.write_bytes(aimed(made.model, str(outside)))
        return path

    return write


def _write(path: Path, content: bytes | Special, outside: Path) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content.kind == "symlink":
        path.symlink_to(content.target.replace(FOREIGN, str(outside)))
    elif content.kind == "hardlink":
        os.link(content.target.replace(FOREIGN, str(outside)), path)
    elif content.kind == "fifo":
        os.mkfifo(path)
    elif content.kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(content.size)


def external(location: str, where: str, **more: str) -> Hostile:
    """A model whose tensor ``w`` [4] lies at ``location``."""
    tensor = onnx.TensorProto(name="w", data_type=FLOAT, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=value)
    return Hostile("", holding(tensor, where), hostile.beside())


OUTSIDE = {
    "the folder above": ("../outside/secret.bin", "outside of the model's folder"),
    "a way around": ("sub/../../outside/secret.bin", "outside of the model's folder"),
    "an absolute path": ("{outside}/secret.bin", "relative to the model's folder"),
    "a link": ("link.bin", "outside of the model's folder"),
    "a folder that is a link": ("linked/secret.bin", "outside of the model's folder"),
    "a device": ("/dev/zero", "relative to the model's folder"),
    "a pipe": ("fifo", "not a plain file"),
    "a folder": ("folder", "not a plain file"),
    "links in a circle": ("loop.bin", "cannot be found"),
    "a NUL": ("data.bin\0.txt", "cannot be found"),
    "a name too long": ("a" * 300, "cannot be found"),
    "backslashes": ("..\\outside\\secret.bin", "missing"),
    "nothing": ("", "relative to the model's folder"),
}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("what", OUTSIDE)
def test_data_that_is_no_plain_file_of_the_folder_is_refused(
    place: Callable[[Hostile], Path], what: str, where: str
) -> None:
    location, reason = OUTSIDE[what]
    assert reason in refusal(place(external(location, where)))


@pytest.mark.parametrize("where", ["initializer", "branch", "attribute", "function"])
def test_data_of_the_folder_is_read_wherever_the_tensor_stands(
    place: Callable[[Hostile], Path], where: str, tmp_path: Path
) -> None:
    """And from the folder of the model, not from the working directory, which has one too."""
    model = load_model(place(external("data.bin", where)))
    assert OrtRunner(model).run({"x": X})["y"].tolist() == (2 * X).tolist()
    Canonicalize().call(model, Context())
    (path,) = save_model(model, tmp_path / "out.onnx")
    assert not external_files(load_model(path))
    assert OrtRunner(path).run({"x": X})["y"].tolist() == (2 * X).tolist()


NUMBERS = {
    "before the file": {"offset": "-4"},
    "beyond its end": {"offset": "8"},
    "of another length": {"length": "12"},
    "no number": {"offset": "x"},
    "of a length beyond all files": {"length": "99999999999999999999"},
}


@pytest.mark.parametrize("what", NUMBERS)
@pytest.mark.parametrize("where", ["initializer", "function"])
def test_places_in_a_file_that_do_not_exist_are_refused(
    place: Callable[[Hostile], Path], what: str, where: str
) -> None:
    refusal(place(external("data.bin", where, **NUMBERS[what])))


def test_a_pipe_and_a_device_are_no_models(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "not a plain file" in refusal(tmp_path / "pipe.onnx")
    assert "not a plain file" in refusal(Path("/dev/zero"))


def test_a_file_that_may_not_be_read_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by its permissions: to root everything is readable."""

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "m.onnx").write_bytes(b"x")
    monkeypatch.setattr(Path, "open", denied)
    assert "Permission denied" in refusal(tmp_path / "m.onnx")


def test_nothing_outside_is_opened_by_the_whole_command(tmp_path: Path) -> None:
    """In a process of its own, because an audit hook stays."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            sandbox = Sandbox(tmp_path / "box")
            made = external("data.bin", "function")
            path = sandbox.place(made.model, made.files)
            with sandbox.watch() as seen:
                code = run_command([str(path), "-o", str(sandbox.out / "o.onnx"), "-q"])
            assert not seen, seen
            assert not sandbox.leftovers()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
