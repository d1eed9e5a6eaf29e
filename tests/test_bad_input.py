"""Everything a user can get wrong: the right exit code, at most four clear lines, nothing left.

One test per line of the list of bad input; ``test_model_io.py`` holds the variants of each.
"""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo_passes
import models
import numpy as np
import onnx
import onnx.helper as oh
import pytest
from conftest import Outcome, token_samples

from optimizer import errors, onnx_wire
from optimizer.model_io import save_model

ROOT = Path(__file__).resolve().parent.parent
DEMO = Path(demo_passes.__file__)
SCALE, HUNGRY = f"{DEMO}:Scale", f"{DEMO}:Hungry"


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
        assert "Traceback" not in found.err
        for part in says:
            assert part in found.err
        after = {item: item.read_bytes() for item in tmp_path.rglob("*") if item.is_file()}
        assert after == before
        return found

    return run


def graph(nodes: list[onnx.NodeProto], w: np.ndarray | None = None) -> bytes:
    value = oh.make_tensor_value_info
    weight = np.eye(3, dtype=np.float32) if w is None else w
    made = oh.make_graph(
        nodes,
        "g",
        [value("x", onnx.TensorProto.FLOAT, [2, 3])],
        [value("y", onnx.TensorProto.FLOAT, [2, 3])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    domains = [oh.make_opsetid("", 18), oh.make_opsetid("acme.ops", 1)]
    content: bytes = oh.make_model(made, opset_imports=domains).SerializeToString()
    return content


def test_a_missing_file(refused: Callable[..., Outcome], tmp_path: Path) -> None:
    refused(2, tmp_path / "none.onnx", says=("none.onnx", "no such file"))


def test_an_empty_file(refused: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "m.onnx").touch()
    refused(2, tmp_path / "m.onnx", says=("is empty",))


def test_a_junk_file(refused: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"this is not a model\n" * 100)
    for words in ([], ["inspect"], ["bench"]):
        refused(2, *words, tmp_path / "m.onnx", says=("not an ONNX model",))
    refused(2, "check", tmp_path / "m.onnx", tmp_path / "m.onnx", says=("not an ONNX model",))


def test_a_folder(refused: Callable[..., Outcome], tmp_path: Path) -> None:
    refused(2, tmp_path, says=("is a folder",))
    refused(2, ".", says=("is a folder",))


def test_a_git_lfs_pointer(refused: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    refused(2, tmp_path / "m.onnx", says=("git lfs pull",))


def test_missing_external_data(refused: Callable[..., Outcome], tmp_path: Path) -> None:
    _, data = save_model(models.build(), tmp_path / "m.onnx", "always")
    data.unlink()
    refused(2, tmp_path / "m.onnx", says=("m.onnx.data", "missing"))


def test_truncated_external_data(refused: Callable[..., Outcome], tmp_path: Path) -> None:
    _, data = save_model(models.build(), tmp_path / "m.onnx", "always")
    data.write_bytes(data.read_bytes()[:5000])
    refused(2, tmp_path / "m.onnx", says=("m.onnx.data", "cut short"))


def test_external_data_outside_the_folder(refused: Callable[..., Outcome], tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    _, data = save_model(models.build(), folder / "m.onnx", "always")
    data.rename(tmp_path / "outside")
    content = (folder / "m.onnx").read_bytes()
    (folder / "m.onnx").write_bytes(content.replace(b"m.onnx.data", b"./../outside"[:11]))
    refused(2, folder / "m.onnx", says=("expected the data beside the model",))
    (folder / "m.onnx").write_bytes(content)
    data.symlink_to(tmp_path / "outside")
    refused(2, folder / "m.onnx", says=("outside of the model's folder",))


def test_a_cycle(refused: Callable[..., Outcome], tmp_path: Path) -> None:
    nodes = [
        oh.make_node("Add", ["x", "b"], ["y"], "one"),
        oh.make_node("Relu", ["y"], ["b"], "two"),
    ]
    (tmp_path / "m.onnx").write_bytes(graph(nodes))
    refused(2, tmp_path / "m.onnx", says=("cycle", "'one'", "'two'"))


def test_a_dangling_input(refused: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(graph([oh.make_node("MatMul", ["x", "gone"], ["y"])]))
    refused(2, tmp_path / "m.onnx", says=("'gone'",))


def test_nan_weights(refused: Callable[..., Outcome], tmp_path: Path) -> None:
    weight = np.full((3, 3), np.nan, np.float32)
    (tmp_path / "m.onnx").write_bytes(graph([oh.make_node("MatMul", ["x", "w"], ["y"])], weight))
    refused(2, tmp_path / "m.onnx", says=("9 NaN", "'w'"))


def test_an_operator_of_an_unknown_domain(refused: Callable[..., Outcome], tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(graph([oh.make_node("Odd", ["x", "w"], ["y"], domain="acme.ops")]))
    refused(6, path, says=("acme.ops", "--custom-ops"))
    refused(2, path, "--custom-ops", tmp_path / "none.so", says=("none.so",))
    (tmp_path / "junk.so").write_bytes(b"not a library")
    refused(6, path, "--custom-ops", tmp_path / "junk.so", says=("junk.so",))


def test_unknown_passes_and_options(refused: Callable[..., Outcome], small: Path) -> None:
    refused(2, small, "--passes", "canonicalise", says=("did you mean 'canonicalize'?",))
    refused(2, small, "--passes", f"{SCALE}:fctor=2", says=("did you mean 'factor'?",))
    refused(2, small, "--passes", SCALE, "--set", "scale.fctor=2", says=("'factor'",))
    refused(2, small, "--passes", f"{SCALE}:factor=big", says=("'big'", "number"))
    refused(2, small, "--passes", f"{DEMO}:Nobody", says=("Nobody",))
    refused(2, small, "--passes", "./none.py:Pass", says=("none.py",))


WRONG_DATA: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "wrong name": ({"input_idz": token_samples()["input_ids"]}, "expected"),
    "missing name": ({"other": np.zeros((2, 3))}, "none of the model's inputs"),
    "wrong shape": ({"input_ids": np.zeros((2, 3, 4, 5), np.int64)}, "axes"),
    "wrong type": ({"input_ids": np.full((2, 3), 0.5, np.float32)}, "expects int64"),
    "NaN": (
        {**token_samples(2, 4), "past_key_values.0.key": np.full((2, 2, 1, 8), np.nan, np.float32)},
        "NaN",
    ),
    "empty": ({"input_ids": np.zeros((0, 4), np.int64)}, "no samples"),
    "out of the vocabulary": ({"input_ids": np.full((2, 4), 50)}, "0..49"),
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
    words = (small, "--passes", SCALE, "--calibration")
    refused(2, *words, junk, says=("junk.npz",))
    refused(2, *words, small.with_name("none.npz"), says=("none.npz",))
    refused(2, *words, "nomodule:function", says=("nomodule",))


def test_a_pass_that_needs_data_without_any(
    refused: Callable[..., Outcome], tmp_path: Path
) -> None:
    save_model(models.build(), tmp_path / "m.onnx")
    refused(2, tmp_path / "m.onnx", "--passes", HUNGRY, says=("'hungry'", "--calibration"))


def test_an_output_that_is_the_input(refused: Callable[..., Outcome], small: Path) -> None:
    refused(2, small, "-o", small, "--force", says=("never overwritten",))
    (small.parent / "link.onnx").symlink_to(small)
    refused(2, small, "-o", small.parent / "link.onnx", "--force", says=("never overwritten",))


def test_an_output_that_exists(refused: Callable[..., Outcome], small: Path) -> None:
    other = small.with_name("other.onnx")
    other.write_text("precious")
    refused(2, small, "-o", other, says=("--force",))
    small.with_name("small.opt.onnx").write_text("precious")
    refused(2, small, says=("--force",))
    small.with_name("small.opt.onnx").unlink()
    small.with_name("small.opt.onnx.manifest.json").symlink_to("nowhere")
    refused(2, small, says=("manifest.json exists", "--force"))
    refused(2, small, "-o", small.parent / "none" / "m.onnx", says=("does not exist",))


def test_a_full_disk(
    refused: Callable[..., Outcome], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_wire, "write_tensor", full)
    for words in ([], ["--external-data", "always"]):
        refused(1, small, *words, says=("No space left on device", "nothing was kept"))


def test_a_disk_that_fills_up_while_the_manifest_is_written(
    refused: Callable[..., Outcome], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_ = Path.open

    def full(path: Path, *words: Any, **options: Any) -> Any:
        if "manifest" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return open_(path, *words, **options)

    monkeypatch.setattr(Path, "open", full)
    refused(1, small, says=("manifest.json", "No space left on device"))


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


def test_ctrl_c(refused: Callable[..., Outcome], small: Path) -> None:
    words = (small, "--passes", f"{DEMO}:Interrupted", "--calibration", "self", "--samples", 1)
    refused(130, *words, says=("interrupted",))


def test_a_recipe_that_is_none(refused: Callable[..., Outcome], small: Path) -> None:
    recipe = small.with_name("r.toml")
    refused(2, small, "--recipe", recipe, says=("r.toml",))
    recipe.write_text("passes: [cqil]")
    refused(2, small, "--recipe", recipe, says=("r.toml", "line 1"))


def test_a_factory_that_does_not_exist(refused: Callable[..., Outcome]) -> None:
    refused(2, "no_such_package.module:factory", says=("no_such_package",))


def test_a_hugging_face_folder_that_is_none(
    refused: Callable[..., Outcome], tmp_path: Path
) -> None:
    refused(2, f"hf:{tmp_path}", says=("config.json",))


def test_a_model_named_like_a_mistyped_command(refused: Callable[..., Outcome]) -> None:
    refused(2, "inspekt", says=("did you mean the command 'inspect'?",))


def test_a_missing_runtime_names_the_extra(
    refused: Callable[..., Outcome], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused(6, small, says=("pip install",))
