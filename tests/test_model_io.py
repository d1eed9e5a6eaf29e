"""Loading without reading weights, refusing what is broken, writing completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import os
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import models
import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import pytest

from optimizer import model_input, model_writer
from optimizer.errors import (
    ExportError,
    MissingDependencyError,
    ModelError,
    OptimizerError,
    OptionError,
    UnsupportedError,
)
from optimizer.model_io import BackgroundHashes, external_files, hash_file, load_model, save_model
from optimizer.runners.ort import OrtRunner


def weights(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


def proto(nodes: list[onnx.NodeProto], **options: Any) -> onnx.ModelProto:
    """A model x [2, 3] -> y [2, 3] with a weight w [3, 3]."""
    value = oh.make_tensor_value_info
    w = options.pop("w", np.eye(3, dtype=np.float32))
    graph = oh.make_graph(
        nodes,
        "g",
        [value("x", onnx.TensorProto.FLOAT, [2, 3])],
        [value("y", onnx.TensorProto.FLOAT, [2, 3])],
        [onnx.numpy_helper.from_array(w, "w")],
    )
    domains = options.pop("domains", {"": 18})
    return oh.make_model(
        graph, opset_imports=[oh.make_opsetid(d, v) for d, v in domains.items()], **options
    )


@pytest.fixture
def matmul() -> onnx.ModelProto:
    return proto([oh.make_node("MatMul", ["x", "w"], ["y"], "product")], ir_version=9)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    save_model(models.build(), path)
    return path


def refusal(path: Path, kind: type[Exception] = ModelError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        load_model(path, **options)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert len(text.splitlines()) <= 4
    return text


@pytest.mark.parametrize("external", ["never", "always"])
def test_a_written_model_reads_back_equal(tmp_path: Path, external: Any) -> None:
    model = models.build(kv_cache=True)
    files = save_model(model, tmp_path / "m.onnx", external)
    assert len(files) == (2 if external == "always" else 1)
    again = load_model(tmp_path / "m.onnx")
    before, after = weights(model), weights(again)
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name], err_msg=name)
    assert [n.op_type for n in again.graph] == [n.op_type for n in model.graph]
    onnx.checker.check_model(str(tmp_path / "m.onnx"))


@pytest.mark.parametrize("external", ["never", "always"])
def test_nothing_written_refers_to_the_data_of_the_input(tmp_path: Path, external: Any) -> None:
    branches = [
        oh.make_graph(
            [oh.make_node("Add", ["x", f"small_{name}"], [f"z_{name}"])], name, [],
            [oh.make_tensor_value_info(f"z_{name}", onnx.TensorProto.FLOAT, [2, 3])],
            [onnx.numpy_helper.from_array(np.full(3, 7, np.float32), f"small_{name}")],
        )
        for name in ("then", "else")
    ]  # fmt: skip
    held = onnx.numpy_helper.from_array(np.array([True]), "held")
    nodes = [
        oh.make_node("Constant", [], ["c"], value=held),
        oh.make_node("If", ["c"], ["z"], then_branch=branches[0], else_branch=branches[1]),
        oh.make_node("MatMul", ["z", "w"], ["y"]),
    ]
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    onnx.save_model(
        proto(nodes, ir_version=9), source / "m.onnx", save_as_external_data=True,
        location="m.data", size_threshold=0, convert_attribute=True,
    )  # fmt: skip
    model = load_model(source / "m.onnx")
    assert external_files(model)
    save_model(model, target / "m.onnx", external)
    assert external_files(model), "the model itself is unchanged"
    (source / "m.data").unlink()
    x = np.ones((2, 3), np.float32)
    (y,) = OrtRunner(target / "m.onnx").run({"x": x}).values()
    np.testing.assert_array_equal(y, x + 7)


@pytest.mark.parametrize("external", ["never", "always"])
def test_the_same_model_gives_the_same_bytes(tmp_path: Path, external: Any) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_model(models.build(), tmp_path / folder / "m.onnx", external)
    for item in (tmp_path / "a").iterdir():
        assert item.read_bytes() == (tmp_path / "b" / item.name).read_bytes()


def test_large_inline_weights_stay_in_the_file(saved: Path) -> None:
    model = load_model(saved)
    large = [
        v.const_value for v in model.graph.initializers.values() if v.const_value.nbytes > 2048
    ]
    assert large
    assert all(isinstance(tensor, ir.ExternalTensor) for tensor in large)
    assert external_files(model) == (saved.resolve(),)


def test_a_model_that_other_tools_wrote_reads_equal(tmp_path: Path, saved: Path) -> None:
    plain = onnx.load(saved)
    onnx.save(plain, tmp_path / "plain.onnx")
    before, after = weights(load_model(saved)), weights(load_model(tmp_path / "plain.onnx"))
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name])


def test_a_hard_linked_model_is_accepted(saved: Path) -> None:
    (saved.parent / "twin.onnx").hardlink_to(saved)
    assert weights(load_model(saved))


def test_a_relative_path_survives_a_change_of_folder(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved.parent)
    model = load_model("model.onnx")
    monkeypatch.chdir("/")
    assert weights(model)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.onnx")


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.onnx"
    path.touch()
    assert "is empty" in refusal(path)


def test_a_folder_is_refused_with_advice(tmp_path: Path, saved: Path) -> None:
    assert "model.onnx" in refusal(saved.parent)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert "hf:" in refusal(tmp_path / "hf")


@pytest.mark.parametrize(
    "content", [b"hello, this is text\n" * 50, b"\x00" * 500, b"PK\x03\x04" + b"x" * 300]
)
def test_junk_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "junk.onnx"
    path.write_bytes(content)
    assert "not an ONNX model" in refusal(path)


def test_a_protobuf_without_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.onnx"
    path.write_bytes(onnx.ModelProto(producer_name="somebody").SerializeToString())
    assert "no ONNX graph" in refusal(path)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_refused(saved: Path, share: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * share)])
    assert "cut short" in refusal(saved)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "m.onnx"
    save_model(models.build(layers=1), path)
    return path.read_bytes()


@hypothesis.settings(
    max_examples=200, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(st.data())
def test_damaged_bytes_are_refused_or_harmless_but_never_a_crash(
    sound: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    damaged = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(sound) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.onnx"
    path.write_bytes(damaged)
    with contextlib.suppress(OptimizerError):
        load_model(path)


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "lfs.onnx"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    assert "git lfs pull" in refusal(path)


def external(tmp_path: Path) -> tuple[Path, Path]:
    path = tmp_path / "model.onnx"
    _, data = save_model(models.build(), path, "always")
    return path, data


def test_missing_external_data_is_named(tmp_path: Path) -> None:
    path, data = external(tmp_path)
    data.unlink()
    assert data.name in refusal(path)


def test_truncated_external_data_is_named(tmp_path: Path) -> None:
    path, data = external(tmp_path)
    data.write_bytes(data.read_bytes()[:-100])
    text = refusal(path)
    assert data.name in text
    assert "cut short" in text


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "a/../../secret.bin"])
def test_external_data_outside_the_folder_is_refused(
    tmp_path: Path, matmul: onnx.ModelProto, location: str
) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(36))
    tensor = matmul.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path = folder / "model.onnx"
    path.write_bytes(matmul.SerializeToString())
    assert location in refusal(path)


def test_external_data_that_links_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    path, data = external(folder)
    data.rename(tmp_path / "elsewhere.bin")
    data.symlink_to(tmp_path / "elsewhere.bin")
    assert "outside of the model's folder" in refusal(path)


def test_a_cache_that_links_to_every_file_is_read(tmp_path: Path) -> None:
    """As a download cache does: the model's own link leads to where its data lies."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, file in enumerate(external(tmp_path / "snapshot")):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(f"../blobs/{number}")
    model = load_model(tmp_path / "snapshot" / "model.onnx")
    assert external_files(model) == (tmp_path / "blobs" / "1",)
    link = tmp_path / "snapshot" / "model.onnx.data"
    link.unlink()
    (tmp_path / "secret").write_bytes((tmp_path / "blobs" / "1").read_bytes())
    link.symlink_to("../secret")
    assert "outside of the model's folder" in refusal(tmp_path / "snapshot" / "model.onnx")


def test_a_cycle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cycle.onnx"
    nodes = [
        oh.make_node("Add", ["x", "b"], ["a"], "first"),
        oh.make_node("Relu", ["a"], ["b"], "second"),
    ]
    nodes.append(oh.make_node("Add", ["b", "w"], ["y"]))
    path.write_bytes(proto(nodes).SerializeToString())
    text = refusal(path)
    assert "cycle" in text
    assert "'first'" in text
    assert "'second'" in text


def test_nodes_in_the_wrong_order_are_sorted(tmp_path: Path, matmul: onnx.ModelProto) -> None:
    """ONNX Runtime takes such files, and its own float16 converter writes them."""
    nodes = [
        oh.make_node("MatMul", ["h", "w"], ["y"], "second"),
        oh.make_node("MatMul", ["x", "w"], ["h"], "first"),
    ]
    path = tmp_path / "unsorted.onnx"
    path.write_bytes(proto(nodes).SerializeToString())
    model = load_model(path)
    assert [node.name for node in model.graph] == ["first", "second"]
    path.write_bytes(matmul.SerializeToString())
    assert not model_input.sort_nodes(load_model(path))


def test_a_dangling_input_is_named(tmp_path: Path) -> None:
    path = tmp_path / "dangling.onnx"
    path.write_bytes(
        proto([oh.make_node("MatMul", ["x", "ghost"], ["y"], "m")]).SerializeToString()
    )
    assert "'ghost'" in refusal(path)


def test_an_output_nobody_computes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "dangling.onnx"
    path.write_bytes(proto([oh.make_node("MatMul", ["x", "w"], ["z"], "m")]).SerializeToString())
    assert "'y'" in refusal(path)


@pytest.mark.parametrize("size", [3, 700])
def test_nan_weights_are_counted(tmp_path: Path, size: int) -> None:
    w = np.zeros((3, size), np.float32)
    w[1, 1] = np.nan
    nodes = [oh.make_node("MatMul", ["x", "w"], ["z"]), oh.make_node("Relu", ["x"], ["y"])]
    path = tmp_path / "nan.onnx"
    path.write_bytes(proto(nodes, w=w).SerializeToString())
    assert f"1 NaN of {3 * size} numbers" in refusal(path)
    assert load_model(path, check_numbers=False)


def test_infinite_weights_are_refused_but_masks_are_not(tmp_path: Path) -> None:
    w = np.full((3, 3), -np.inf, np.float32)
    path = tmp_path / "inf.onnx"
    path.write_bytes(proto([oh.make_node("MatMul", ["x", "w"], ["y"])], w=w).SerializeToString())
    assert "9 infinite" in refusal(path)
    turned = [oh.make_node("Transpose", ["w"], ["t"]), oh.make_node("MatMul", ["x", "t"], ["y"])]
    path.write_bytes(proto(turned, w=w).SerializeToString())
    assert "9 infinite" in refusal(path)
    row = np.array([0, 0, -np.inf], np.float32)
    path.write_bytes(proto([oh.make_node("Add", ["x", "w"], ["y"])], w=row).SerializeToString())
    assert load_model(path)


def test_an_operator_of_an_unknown_domain_needs_its_library(tmp_path: Path) -> None:
    path = tmp_path / "custom.onnx"
    node = oh.make_node("Frobnicate", ["x", "w"], ["y"], "odd", domain="acme.ops")
    path.write_bytes(proto([node], domains={"": 18, "acme.ops": 1}).SerializeToString())
    text = refusal(path, MissingDependencyError)
    assert "acme.ops" in text
    assert "--custom-ops" in text
    library = tmp_path / "lib.so"
    library.touch()
    assert load_model(path, [library])
    with pytest.raises(OptionError, match=r"none\.so"):
        load_model(path, [tmp_path / "none.so"])


def test_an_operator_the_standard_lacks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "typo.onnx"
    path.write_bytes(proto([oh.make_node("MatMull", ["x", "w"], ["y"], "m")]).SerializeToString())
    assert "MatMull" in refusal(path)


def test_models_from_the_future_are_refused(tmp_path: Path, matmul: onnx.ModelProto) -> None:
    path = tmp_path / "future.onnx"
    matmul.opset_import[0].version = 99
    path.write_bytes(matmul.SerializeToString())
    assert "opset 99" in refusal(path, UnsupportedError)
    matmul.opset_import[0].version = 18
    matmul.ir_version = 999
    path.write_bytes(matmul.SerializeToString())
    assert "IR version 999" in refusal(path, UnsupportedError)


def test_weights_of_the_wrong_length_are_refused(tmp_path: Path, matmul: onnx.ModelProto) -> None:
    path = tmp_path / "short.onnx"
    matmul.graph.initializer[0].raw_data = bytes(20)
    path.write_bytes(matmul.SerializeToString())
    assert "20 bytes, expected 36" in refusal(path)


def test_a_value_defined_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.onnx"
    nodes = [oh.make_node("Relu", ["x"], ["y"]), oh.make_node("Tanh", ["x"], ["y"])]
    path.write_bytes(proto(nodes).SerializeToString())
    assert "'y'" in refusal(path)


def test_an_existing_output_needs_force(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(OptionError, match="--force"):
        save_model(models.build(layers=1), saved)
    assert saved.read_bytes() == before
    save_model(models.build(layers=1), saved, force=True)
    assert saved.read_bytes() != before


def test_the_input_and_its_data_are_never_overwritten(tmp_path: Path) -> None:
    path, data = external(tmp_path)
    model = load_model(path)
    protected = (path, *external_files(model))
    link = tmp_path / "link.onnx"
    link.symlink_to(path)
    for target in (path, link, data.with_name("model.onnx")):
        with pytest.raises(OptionError, match="never overwritten"):
            save_model(model, target, force=True, protected=protected)
    other = tmp_path / "other.onnx"
    data.rename(tmp_path / "other.onnx.data")
    with pytest.raises(OptionError, match="never overwritten"):
        save_model(model, other, protected=(tmp_path / "other.onnx.data",))


def test_an_output_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="does not exist"):
        save_model(models.build(), tmp_path / "none" / "m.onnx")
    with pytest.raises(OptionError, match="is a folder"):
        save_model(models.build(), tmp_path)


class _FullDisk(io.FileIO):
    """A file on a disk with room for a few bytes."""

    def write(self, content: Any) -> int:
        if self.tell() + len(content) > 2000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content)

    def fileno(self) -> int:
        raise io.UnsupportedOperation("every write goes through this class")


@pytest.mark.parametrize("external_data", ["never", "always"])
def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external_data: Any
) -> None:
    monkeypatch.setattr(Path, "open", lambda self, mode: _FullDisk(self, "x"))
    with pytest.raises(ExportError, match="No space left on device") as caught:
        save_model(models.build(), tmp_path / "m.onnx", external_data)
    assert "free" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_model(models.build(), tmp_path / "m.onnx", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_output(saved: Path) -> None:
    before = saved.read_bytes()

    def fail(_done: int, _total: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(ExportError):
        save_model(models.build(layers=1), saved, force=True, progress=fail)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_data_goes_outside_from_the_limit_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_writer, "EXTERNAL_FROM", 1000)
    files = save_model(models.build(), tmp_path / "m.onnx")
    assert [item.name for item in files] == ["m.onnx", "m.onnx.data"]


def test_lazy_weights_are_evaluated_one_at_a_time(tmp_path: Path) -> None:
    alive = most = 0

    class Counted(np.ndarray):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def make() -> ir.Tensor:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return ir.Tensor(np.zeros((32, 32), np.float32).view(Counted))

    model = models.build()
    for value in model.graph.initializers.values():
        if tuple(value.shape) == (32, 32):
            value.const_value = ir.LazyTensor(
                make, ir.DataType.FLOAT, ir.Shape([32, 32]), name=value.name
            )
    save_model(model, tmp_path / "m.onnx")
    assert most == 1


def test_a_lazy_weight_that_breaks_its_promise_is_no_output(tmp_path: Path) -> None:
    model = models.build()
    value = next(v for v in model.graph.initializers.values() if v.const_value.nbytes > 2048)
    value.const_value = ir.LazyTensor(
        lambda: ir.Tensor(np.zeros(3, np.float32)), ir.DataType.FLOAT, value.shape, name=value.name
    )
    with pytest.raises(ValueError, match="wrote 12 bytes"):
        save_model(model, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_checking_the_numbers_keeps_no_weight_in_memory(saved: Path) -> None:
    for value in load_model(saved).graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            assert value.const_value.raw is None, value.name


def test_hashes_in_the_background_are_those_of_the_files(saved: Path) -> None:
    assert BackgroundHashes([saved, saved]).items() == [(saved, hash_file(saved))]
    with pytest.raises(OSError, match="none"):
        BackgroundHashes([saved.with_name("none")]).items()


def test_hashes_are_sha256(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert hash_file(path).startswith("ba7816bf8f01cfea414140de5dae2223")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (437_900_000, "438 MB"),
        (3_070_000_000, "3.07 GB"),
    ],
)
def test_sizes_are_readable(count: int, text: str) -> None:
    assert model_writer.size_text(count) == text


def test_a_file_that_stands_where_ours_is_made_is_neither_followed_nor_removed(
    tmp_path: Path,
) -> None:
    """Who may write to the folder could have put a link there."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    planted = tmp_path / f".m.onnx.{os.getpid()}.tmp"
    planted.symlink_to(victim)
    with pytest.raises(ExportError, match="File exists"):
        save_model(models.build(), tmp_path / "m.onnx")
    assert planted.is_symlink()
    assert victim.read_text() == "precious"
    assert not (tmp_path / "m.onnx").exists()


def test_a_link_in_the_place_of_an_output_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "m.onnx"
    victim.write_text("precious")
    path.symlink_to(victim)
    with pytest.raises(OptionError, match="--force"):
        save_model(models.build(), path)
    save_model(models.build(), path, force=True)
    assert not path.is_symlink()
    assert victim.read_text() == "precious"


def test_external_data_that_exists_is_only_replaced_with_force(tmp_path: Path) -> None:
    (tmp_path / "m.onnx.data").write_text("precious")
    with pytest.raises(OptionError, match=r"m\.onnx\.data exists"):
        save_model(models.build(), tmp_path / "m.onnx", "always")
    save_model(models.build(), tmp_path / "m.onnx")  # needs no such file
    assert (tmp_path / "m.onnx.data").read_text() == "precious"
