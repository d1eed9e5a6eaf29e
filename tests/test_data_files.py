"""Weights that lie in several files stay apart, and every file is told of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import models
import numpy as np
import onnx_ir as ir
import pytest

from optimizer import data_files, model_writer
from optimizer.api import optimize
from optimizer.data_files import distribute, note_source, source_file
from optimizer.errors import ExportError, OptionError
from optimizer.model_io import external_files, hash_file, load_model, save_model

SHARDS = ("first.bin", "second.bin")


def shard_of(name: str) -> str:
    """Layer 0 lies in one file, all else in the other."""
    return SHARDS[0] if name.startswith("layers.0.") else SHARDS[1]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model with large enough weights in two files."""
    folder = tmp_path / "in"
    folder.mkdir()
    model = models.build(hidden=64, ffn=96)
    ends = dict.fromkeys(SHARDS, 0)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor.nbytes <= 1024:
            continue
        shard = shard_of(name)
        with (folder / shard).open("ab") as file:
            file.write(tensor.tobytes())
        value.const_value = ir.ExternalTensor(
            shard, ends[shard], tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name,
            base_dir=folder,
        )  # fmt: skip
        ends[shard] += tensor.nbytes
    ir.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def layers_by_file(path: Path) -> dict[str, set[bool]]:
    """For each data file, whether its weights are those of layer 0."""
    found: dict[str, set[bool]] = {}
    for name, value in load_model(path).graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            place = Path(value.const_value.path).name
            found.setdefault(place, set()).add(name.startswith("layers.0."))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in sorted(folder.iterdir())}


def test_the_shards_of_the_input_are_those_of_the_output(sharded: Path, tmp_path: Path) -> None:
    before = contents(sharded.parent)
    result = optimize(sharded, output=tmp_path / "out.onnx", verify="off")
    names = [item.name for item in result.files]
    assert names[:3] == ["out.onnx", "out.onnx.1.data", "out.onnx.2.data"]
    found = layers_by_file(tmp_path / "out.onnx")
    assert [found["out.onnx.1.data"], found["out.onnx.2.data"]] in (
        [{True}, {False}], [{False}, {True}],
    )  # fmt: skip
    assert contents(sharded.parent) == before


def test_transposed_weights_are_as_they_were_and_outputs_too(sharded: Path, tmp_path: Path) -> None:
    optimize(sharded, output=tmp_path / "out.onnx")  # verified
    again = load_model(tmp_path / "out.onnx")
    assert len(external_files(again)) == 2


def test_the_manifest_names_every_file_with_its_hash(sharded: Path, tmp_path: Path) -> None:
    result = optimize(sharded, output=tmp_path / "out.onnx", verify="off")
    manifest = json.loads(result.files[-1].read_text())
    outputs = {item["file"]: item["sha256"] for item in manifest["outputs"]}
    assert outputs == {item.name: hash_file(item) for item in result.files[:-1]}
    inputs = {item["file"]: item["sha256"] for item in manifest["inputs"]}
    assert inputs == {
        item.name: hashlib.sha256(item.read_bytes()).hexdigest()
        for item in sorted(sharded.parent.iterdir())
    }


def test_two_runs_write_the_same_bytes(sharded: Path, tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        optimize(sharded, output=tmp_path / name / "out.onnx", verify="off")
        made.append(contents(tmp_path / name))
        made[-1].pop("out.onnx.manifest.json")  # holds times
    assert made[0] == made[1]


def test_int8_weights_go_with_those_they_were_made_of(sharded: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 32, (4, 8))
    result = optimize(
        sharded,
        "outliertune",
        calibration={"input_ids": ids, "attention_mask": np.ones_like(ids)},
        output=tmp_path / "out.onnx",
        verify="off",
    )
    codes = {
        name: Path(value.const_value.path).name
        for name, value in load_model(result.path).graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor) and name.endswith("_int8")
    }
    places = {name.startswith("layers.0."): place for name, place in codes.items()}
    assert len(codes) > 4
    assert len(set(places.values())) == 2
    assert all(places[name.startswith("layers.0.")] == place for name, place in codes.items())


@pytest.mark.parametrize("name", ["out.onnx.2.data", "out.onnx.manifest.json", "out.onnx"])
def test_nothing_that_exists_is_replaced_without_force(
    sharded: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(OptionError, match=r"exists; choose another -o"):
        optimize(sharded, output=tmp_path / "out.onnx", verify="off")
    assert [item.name for item in tmp_path.iterdir() if item.is_file()] == [name]
    optimize(sharded, output=tmp_path / "out.onnx", verify="off", force=True)
    assert (tmp_path / name).read_bytes() != b"precious"


def test_a_data_file_of_the_input_is_never_replaced(sharded: Path) -> None:
    first = sharded.with_name("out.onnx.1.data")
    sharded.with_name(SHARDS[0]).rename(first)
    sharded.with_name(SHARDS[0]).symlink_to(first)
    before = first.read_bytes()
    with pytest.raises(OptionError, match="is the input itself"):
        optimize(sharded, output=sharded.with_name("out.onnx"), verify="off", force=True)
    assert first.read_bytes() == before


def test_a_model_in_memory_does_not_lose_its_files(tmp_path: Path) -> None:
    save_model(models.build(), tmp_path / "m.onnx", "always")
    before = contents(tmp_path)
    model = ir.load(tmp_path / "m.onnx")
    with pytest.raises(OptionError, match="is the input itself"):
        optimize(model, output=tmp_path / "m.onnx", verify="off", force=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_all_files_appear_or_none(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The disk is full when the first weight, the last, or the manifest is written."""
    writes, real = [], model_writer.onnx_wire.write_tensor

    def write(tensor: ir.TensorProtocol, file: object) -> None:
        writes.append(tensor)
        if failing < 3 and len(writes) == 1 + 5 * failing:
            raise OSError(28, "No space left on device")
        real(tensor, file)  # type: ignore[arg-type]

    def manifest(*_args: object, **_kwargs: object) -> dict[str, object]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_writer.onnx_wire, "write_tensor", write)
    if failing == 3:
        monkeypatch.setattr("optimizer.job.make_manifest", manifest)
    old = {"out.onnx": b"old", "out.onnx.1.data": b"data", "out.onnx.manifest.json": b"{}"}
    for name, text in old.items():
        (tmp_path / name).write_bytes(text)
    with pytest.raises(ExportError, match="No space left"):
        optimize(sharded, output=tmp_path / "out.onnx", verify="off", force=True)
    assert {i.name: i.read_bytes() for i in tmp_path.iterdir() if i.is_file()} == old


class TestDistribute:
    def external(self, folder: Path, name: str) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            name, 0, 4, ir.DataType.FLOAT, shape=ir.Shape([1]), name=name, base_dir=folder
        )

    def test_one_source_is_one_file(self, tmp_path: Path):
        tensors = [self.external(tmp_path, "a"), ir.tensor([1.0])]
        assert distribute(tensors, [tmp_path / "a"]) == [[0, 1]]
        assert distribute([], []) == [[]]

    def test_what_came_from_no_file_gets_one_of_its_own(self, tmp_path: Path):
        tensors = [self.external(tmp_path, "b"), ir.tensor([1.0]), self.external(tmp_path, "a")]
        sources = [tmp_path / "a", tmp_path / "b"]
        assert distribute(tensors, sources) == [[2], [0], [1]]
        assert distribute(tensors[1:], sources) == [[1], [0]]

    def test_a_file_per_weight_is_no_sharding(self, tmp_path: Path):
        names = [str(n) for n in range(data_files.MOST_FILES + 1)]
        tensors = [self.external(tmp_path, name) for name in names]
        sources = [tmp_path / name for name in names]
        assert len(distribute(tensors, sources)) == 1
        assert len(distribute(tensors, sources[1:])) == len(sources)

    def test_a_source_is_remembered_without_its_numbers(self, tmp_path: Path):
        made, again = ir.tensor([1.0]), ir.tensor([2.0])
        note_source(made, self.external(tmp_path, "a"))
        note_source(again, made)
        note_source(made, ir.tensor([3.0]))
        assert source_file(again) == source_file(made) == tmp_path / "a"
        assert source_file(ir.tensor([1.0])) is None
