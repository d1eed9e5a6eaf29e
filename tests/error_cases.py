"""Everything a user can get wrong, as data: the README's table of errors and its tests.

``python tests/error_cases.py`` prints the table. A row says what was done, with which code the
command ends, and what its message advises; ``test_bad_input.py`` does it and looks. ``raised_by``
names the functions that refuse, so that none in the program is without a row.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_passes
import models
import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import onnxruntime
import pytest
from fake_machine import elf
from fuzzing.bombs import nested_functions
from fuzzing.files import holding
from played_cuda import stage

from optimizer.hashing import hash_file
from optimizer.model_io import save_model

DEMO = Path(demo_passes.__file__)
SCALE, HUNGRY = f"{DEMO}:Scale", f"{DEMO}:Hungry"


@dataclass(frozen=True)
class Place:
    """Where a mistake is made.

    Attributes:
        folder: Empty, but for ``small``.
        small: A small language model, with its calibration data beside it.
        patch: Undone afterwards.
    """

    folder: Path
    small: Path
    patch: pytest.MonkeyPatch

    @property
    def model(self) -> Path:
        """Where a row writes its own model."""
        return self.folder / "m.onnx"

    def write(self, content: bytes) -> Path:
        self.model.write_bytes(content)
        return self.model

    def npz(self, **arrays: Any) -> Path:
        np.savez(self.folder / "data.npz", **arrays)
        return self.folder / "data.npz"

    def cached(self) -> Path:
        """A model with a KV cache."""
        save_model(models.build(kv_cache=True), self.model)
        return self.model

    def external(self) -> Path:
        """A model with external data; returns the data."""
        return save_model(models.build(), self.model, "always")[1]


Words = list[Any]


@dataclass(frozen=True)
class Row:
    """One mistake.

    Attributes:
        what: The situation, as the README says it.
        code: Exit code.
        advice: What the message advises, as the README says it.
        says: Parts of the message.
        do: Makes the mistake: prepares files and returns the words of the command.
        raised_by: Functions that refuse, as module.function.
    """

    what: str
    code: int
    advice: str
    says: tuple[str, ...]
    do: Callable[[Place], Words]
    raised_by: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return self.what.replace("`", "").replace(" ", "-")


def graph(nodes: list[onnx.NodeProto], w: np.ndarray | None = None, opset: int = 18) -> bytes:
    """A model x [2, 3] -> y [2, 3] with a weight w."""
    value = oh.make_tensor_value_info
    weight = np.eye(3, dtype=np.float32) if w is None else w
    made = oh.make_graph(
        nodes,
        "g",
        [value("x", onnx.TensorProto.FLOAT, [2, 3])],
        [value("y", onnx.TensorProto.FLOAT, [2, 3])],
        [onh.from_array(weight, "w")],
    )
    domains = [oh.make_opsetid("", opset), oh.make_opsetid("acme.ops", 1)]
    content: bytes = oh.make_model(made, opset_imports=domains).SerializeToString()
    return content


_NODE = oh.make_node


def _outside(place: Place) -> Words:
    data = place.external()
    target = place.folder.parent / "outside"
    data.rename(target)
    data.symlink_to(target)
    return [place.model]


def _removed(place: Place) -> Words:
    place.external().unlink()
    return [place.model]


def _cut(place: Place) -> Words:
    data = place.external()
    data.write_bytes(data.read_bytes()[:5000])
    return [place.model]


def _newer(place: Place) -> Words:
    return [place.write(graph([_NODE("MatMul", ["x", "w"], ["y"])], opset=25))]


def _sparse(place: Place) -> Words:
    model = onnx.ModelProto.FromString(graph([_NODE("MatMul", ["x", "v"], ["y"])]))
    values, index = onh.from_array(np.ones(1, np.float32), "v"), onh.from_array(np.array([99]), "i")
    model.graph.sparse_initializer.append(oh.make_sparse_tensor(values, index, [3, 3]))
    return [place.write(model.SerializeToString())]


def _undeclared(place: Place) -> Words:
    node = _NODE(
        "SparseMatMul", ["x", "w", "w", "w"], ["y"], domain="optimize", declaration=5, name="l"
    )
    made = onnx.load_from_string(graph([node]))
    made.opset_import.append(oh.make_opsetid("optimize", 1))
    return [place.write(made.SerializeToString())]


FILES = (
    Row("MODEL does not exist", 2, "a file, `hf:FOLDER` or `package.module:factory`",
        ("none.onnx", "no such file", "hf:FOLDER"), lambda p: [p.folder / "none.onnx"],
        ("model_io._check_file", "model_io.load_model")),
    Row("MODEL is a folder", 2, "name the file in it, or write `hf:FOLDER`",
        ("is a folder", "name the file"), lambda p: [p.folder]),
    Row("MODEL is empty, or no plain file (a pipe, a device)", 2, "an ONNX model",
        ("not a plain file",), lambda p: [os.mkfifo(p.folder / "pipe") or p.folder / "pipe"]),
    Row("MODEL is a Git LFS pointer", 2, "`git lfs pull`", ("git lfs pull",),
        lambda p: [p.write(b"version https://git-lfs.github.com/spec/v1\noid x\n")]),
    Row("MODEL is a TensorRT engine", 2, "the commands that take one",
        ("is a TensorRT engine", "'optimize inspect'"), lambda p: [p.write(b"ftrt" + bytes(60))]),
    Row("MODEL is no ONNX file, or is cut short", 2, "a complete file",
        ("not an ONNX model", "cut short", "complete"), lambda p: [p.write(b"no model\n" * 100)],
        ("model_io._parse",)),
    Row("MODEL is protobuf, but no valid model", 2, "what is wrong, and with which node",
        ("not a valid model", "Softmax", "axis"),
        lambda p: [p.write(graph([_NODE("Softmax", ["x"], ["y"], axis=1.5)]))],
        ("model_input.check_nodes",)),
    Row("MODEL has stored weights that another version of this program wrote", 2,
        "make the file again from its source", ("declaration 5", "make the file again"),
        _undeclared, ("custom_ops.bodies.restore_bodies",)),
    Row("external data is missing", 2, "copy it there together with the model",
        ("m.onnx.data", "missing", "copy it there"), _removed, ("model_tensors._check_data_file",)),
    Row("external data is cut short", 2, "copy it again", ("cut short", "copy it again"), _cut,
        ("model_tensors.map_external",)),
    Row("external data lies outside of the model's folder, also through a link", 2,
        "copy it beside the model", ("outside of the model's folder", "copy it there"), _outside),
    Row("a tensor does not hold what its type and shape say", 2, "what was found and expected",
        ("holds 15 bytes, expected 16",),
        lambda p: [p.write(holding(
            onnx.TensorProto(name="w", data_type=1, dims=[4], raw_data=b"0" * 15), "function"))],
        ("model_tensors._refuse_count",)),
    Row("a sparse initializer makes no sense, or would be huge", 2, "what was found",
        ("sparse initializer 'v'", "outside of it"), _sparse, ("sparse_input._dense",)),
    Row("weights are NaN, or infinite", 2, "export again from a sound checkpoint",
        ("9 NaN", "'w'", "sound checkpoint"),
        lambda p: [p.write(graph([_NODE("MatMul", ["x", "w"], ["y"])],
                                 np.full((3, 3), np.nan, np.float32)))],
        ("model_input.check_numbers",)),
    Row("the graph has a cycle, or reads what nobody defines", 2, "the nodes and the value",
        ("cycle", "'one'", "'two'"),
        lambda p: [p.write(graph([_NODE("Add", ["x", "b"], ["y"], "one"),
                                  _NODE("Relu", ["y"], ["b"], "two")]))],
        ("model_input.check_wiring",)),
    Row("a value is defined twice", 2, "the name", ("'y' twice",),
        lambda p: [p.write(graph([_NODE("Relu", ["x"], ["y"]), _NODE("Neg", ["x"], ["y"])]))],
        ("model_input.check_names",)),
    Row("a node lacks a required input", 2, "the node and the input", ("lacks its input 1",),
        lambda p: [p.write(graph([_NODE("MatMul", ["x", ""], ["y"])]))],
        ("model_input._check_node",)),
    Row("a function calls itself, or unfolds to more than a million nodes", 2, "the function",
        ("calls itself",),
        lambda p: [p.write(nested_functions(3, recursive=True).model)],
        ("model_functions._sizes",)),
    Row("the model is newer than opset 24", 2, "export it with opset 23",
        ("opset 25", "24", "opset 23"), _newer, ("model_input.check_versions",)),
    Row("ONNX Runtime cannot run the model", 2, "the node and the reason", ("'product'", "MatMul"),
        lambda p: [p.write(graph([_NODE("MatMul", ["x", "w"], ["y"], "product")],
                                 np.ones((4, 3), np.float32)))]),
    Row("an operator of an unknown domain", 6, "`--custom-ops LIB`", ("acme.ops", "--custom-ops"),
        lambda p: [p.write(graph([_NODE("Odd", ["x", "w"], ["y"], domain="acme.ops")]))],
        ("model_input.check_operators",)),
)  # fmt: skip


def _recipe(place: Place, text: str) -> Words:
    recipe = place.folder / "r.toml"
    recipe.write_text(text)
    return [place.small, "--recipe", recipe]


def _in_place_for_tensorrt(place: Place) -> Words:
    return [place.small, "--kv-cache", "in-place", "--target", "tensorrt-10"]


def _script(place: Place, text: str) -> Words:
    (place.folder / "my.py").write_text(text)
    return [place.small, "--passes", f"{place.folder / 'my.py'}:fix"]


def _twins(place: Place) -> Words:
    words = _script(place, DEMO.read_text())
    return [*words[:2], f"{SCALE},{place.folder / 'my.py'}:Scale"]


def _no_torch(place: Place) -> Words:
    place.patch.setitem(sys.modules, "torch", None)
    return ["demo_passes:factory"]


def untraceable() -> Any:
    """A module that stops whoever traces it, and an input."""
    import torch

    class Untraceable(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x if float(x.sum()) > 0 else -x

    return Untraceable(), (torch.ones(2, 2),)


OPTIONS = (
    Row("a mistyped command", 2, "the nearest one", ("did you mean the command 'inspect'?",),
        lambda _: ["inspekt"], ("cli._check_word",)),
    Row("a picture of the tokens of a model that does not tell where they went", 2,
        "the pass that makes one", ("--passes tome:places=true",),
        lambda p: ["inspect", p.small, "--tokens", p.folder / "images.npz"],
        ("token_picture.picture",)),
    Row("an unknown option of the command", 2, "the nearest one", ("--passes",),
        lambda p: [p.small, "--pases", "cqil"]),
    Row("an unknown pass", 2, "the nearest one", ("did you mean 'canonicalize'?",),
        lambda p: [p.small, "--passes", "canonicalise"], ("passes.get_pass",)),
    Row("a pass from a file that has none", 2, "the classes that are there",
        ("Nobody",), lambda p: [p.small, "--passes", f"{DEMO}:Nobody"],
        ("external_passes.load_file",)),
    Row("a pass from a file that does not exist, or fails", 2, "the file", ("none.py",),
        lambda p: [p.small, "--passes", "./none.py:Pass"]),
    Row("a pass from a file, or of another distribution, that lacks what a pass must have", 2,
        "what it lacks", ("my.py:fix", "GraphPass"),
        lambda p: _script(p, "class fix:\n    pass\n"), ("external_passes.checked",)),
    Row("a function as a pass that is none of onnx-graphsurgeon's", 2, "how it is written",
        ("gs.Graph",), lambda p: _script(p, "def fix():\n    pass\n"),
        ("graphsurgeon.pass_of_function",)),
    Row("a function of yours that fails, or leaves no graph", 2, "the line, and what it raised",
        ("my.py:2", "KeyError"),
        lambda p: _script(p, "def fix(graph):\n    {}['none']\n"),
        ("graphsurgeon.Script._run",)),
    Row("two passes of one name", 2, "to rename one", ("'scale'", "rename"), _twins,
        ("recipe._check_names",)),
    Row("`passes --conformance` without a pass", 2, "how one is named", ("./my.py:MyPass",),
        lambda _: ["passes", "--conformance"], ("cli.passes.passes_command",)),
    Row("`bisect`: the check is no command, or fails on the original model", 2,
        "what the check said", ("the original model", "exit status 1"),
        lambda p: ["bisect", p.small, "--passes", SCALE, "--check", "false"],
        ("bisection.Bisection._ask_original",)),
    Row("an unknown option of a pass", 2, "the nearest one", ("did you mean 'factor'?",),
        lambda p: [p.small, "--passes", f"{SCALE}:fctor=2"], ("recipe.make_options",)),
    Row("an option of a pass with a wrong value", 2, "what is accepted", ("'big'", "number"),
        lambda p: [p.small, "--passes", f"{SCALE}:factor=big"]),
    Row("options of a pass that contradict each other", 2, "how they agree",
        ("sparsity is 0.7", "pattern=2:4 has 0.5", "pattern=unstructured"),
        lambda p: [p.small, "--passes", "sparsify:pattern=2:4;sparsity=0.7"]),
    Row("`--set` for a pass that is not named", 2, "the passes that are", ("nobody", "scale"),
        lambda p: [p.small, "--passes", SCALE, "--set", "nobody.factor=2"],
        ("recipe._apply_overrides",)),
    Row("a list of passes that cannot be read", 2, "how it is written", ("factor", "="),
        lambda p: [p.small, "--passes", f"{SCALE}:factor"], ("recipe._parse_step",)),
    Row("passes in an order that makes no sense", 2, "the right order", ("order", "swap"),
        lambda p: [p.small, "--passes", f"{DEMO}:Swap,{DEMO}:Scale"], ("recipe.check_order",)),
    Row("an unknown target", 2, "the nearest one", ("did you mean 'ort-cpu'?",),
        lambda p: [p.small, "--target", "ort-cpuu"], ("targets.get_target",)),
    Row("an opset that the target does not take", 2, "the range", ("found 12", "18 to 24"),
        lambda p: [p.small, "--opset", "12"], ("recipe._check_target",)),
    Row("a form of the KV cache that the target does not have", 2, "those that it has",
        ("in-place", "append"), _in_place_for_tensorrt),
    Row("a model that the target, opset or form of the KV cache asked for cannot hold", 2,
        "the reason, and what to choose instead", ("in-place", "append"),
        lambda p: [p.small, "--kv-cache", "in-place", "--verify", "off"]),
    Row("a recipe that cannot be read", 2, "the line", ("r.toml", "line 1"),
        lambda p: _recipe(p, "passes: [cqil]"), ("recipe.load_recipe",)),
    Row("a recipe with a key that does not exist", 2, "the nearest one", ("r.toml", "targt"),
        lambda p: _recipe(p, 'version = 1\ntargt = "ort-cpu"\n'), ("recipe.make_recipe",)),
    Row("a size, a length or a budget that cannot be read", 2, "how it is written",
        ("found 'top1~0.9'",), lambda p: [p.small, "--budget", "top1~0.9"],
        ("budget._limit",)),
    Row("`--custom-ops` names no file", 2, "the file", ("none.so", "does not exist"),
        lambda p: [p.small, "--custom-ops", p.folder / "none.so"]),
    Row("`--custom-ops` names no library of operators", 6, "the reason", ("cannot be loaded",),
        lambda p: [p.small, "--custom-ops", p.small], ("runners.ort.session_options",)),
    Row("a factory that does not exist or returns no module", 2, "what was found",
        ("no_such_package",), lambda _: ["no_such_package.module:factory"],
        ("frontends.torch_module._import",)),
    Row("a module that torch cannot export", 2, "the cause", ("could not export", "Untraceable"),
        lambda _: ["error_cases:untraceable"], ("frontends.onnx_export.trace",)),
    Row("a Hugging Face folder without a model, or of an unknown kind", 2, "what is missing",
        ("config.json",), lambda p: [f"hf:{p.folder}"], ("frontends.hugging_face._folder",)),
    Row("ONNX Runtime, torch or transformers is not installed", 6, "`pip install ...[EXTRA]`",
        ("pip install", "torch"), _no_torch, ("frontends.onnx_export.require",)),
)  # fmt: skip


def _fed(**arrays: Any) -> Callable[[Place], Words]:
    def do(place: Place) -> Words:
        return [place.cached(), "--passes", SCALE, "--calibration", place.npz(**arrays)]

    return do


def _unnamed_axis(place: Place) -> Words:
    value = oh.make_tensor_value_info
    made = oh.make_graph(
        [_NODE("Relu", ["x"], ["y"])],
        "g",
        [value("x", onnx.TensorProto.FLOAT, [1, "width"])],
        [value("y", onnx.TensorProto.FLOAT, [1, "width"])],
    )
    opset = [oh.make_opsetid("", 18)]
    path = place.write(oh.make_model(made, opset_imports=opset).SerializeToString())
    return ["bench", path]


DATA = (
    Row("sample data that does not exist, or cannot be read", 2, "the forms that are read",
        ("--calibration", "none.npz"),
        lambda p: [p.small, "--passes", SCALE, "--calibration", p.folder / "none.npz"],
        ("sample_sources._from_text",)),
    Row("sample data from a function that does not exist, or yields something else", 2,
        "the module and the function", ("nomodule",),
        lambda p: [p.small, "--passes", SCALE, "--calibration", "nomodule:function"],
        ("sample_sources._import_function",)),
    Row("sample data with other names than the model's inputs", 2, "the nearest one",
        ("input_idz", "input_ids"), _fed(input_idz=np.zeros((2, 4), np.int64))),
    Row("sample data of another shape", 2, "the shape", ("axes",),
        _fed(input_ids=np.zeros((2, 3, 4, 5), np.int64)), ("inputs.check_shape",)),
    Row("sample data of another type", 2, "the type", ("expects int64",),
        _fed(input_ids=np.full((2, 3), 0.5, np.float32)), ("samples._converted",)),
    Row("sample data with NaN, or with tokens out of the vocabulary", 2, "the range", ("0..49",),
        _fed(input_ids=np.full((2, 4), 50)), ("samples._check_values",)),
    Row("an empty set of samples", 2, "at least one", ("no samples",),
        _fed(input_ids=np.zeros((0, 4), np.int64)), ("samples.load_samples",)),
    Row("a pass that needs data, without any", 2, "`--calibration`",
        ("'hungry'", "--calibration"),
        lambda p: [p.small.rename(p.folder / "alone.onnx"), "--passes", HUNGRY],
        ("pipeline.require_data",)),
    Row("a pass that would make the model slower on the target", 2, "another pass or target",
        ("'ort-cuda'", "fp16"), lambda p: [p.small, "--passes", "outliertune", "--target",
        "ort-cuda"], ("passes.outliertune._check_target",)),
    Row("`--calibration self` for a model that writes no text", 2, "give a file",
        ("input_ids", "file"),
        lambda p: [p.write(graph([_NODE("MatMul", ["x", "w"], ["y"])])), "--passes", SCALE,
                   "--calibration", "self"], ("generation.self_samples",)),
    Row("an axis whose length nobody knows, for `bench`", 2, "`--shape NAME=N`",
        ("'width'", "--shape width=8"), _unnamed_axis, ("feeds._length",)),
)  # fmt: skip


def full_disk(place: Place) -> Words:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    place.patch.setattr("optimizer.onnx_wire.write_tensor", full)
    return [place.small]


def _touched(place: Place) -> Path:
    path = place.folder / "other.onnx"
    path.write_text("precious")
    return path


def _too_large(place: Place) -> Words:
    place.patch.setattr("optimizer.model_writer._PROTOBUF_LIMIT", 1000)
    return [place.small, "--external-data", "never"]


def _exhausted(place: Place) -> Words:
    def exhausted(*_: Any, **__: Any) -> None:
        raise MemoryError

    place.patch.setattr("optimizer.job.load_model", exhausted)
    return [place.small]


def _broken(place: Place) -> Words:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    place.patch.setattr("optimizer.job.load_model", broken)
    return [place.small]


def _drifted(place: Place) -> Words:
    other = place.folder / "drifted.onnx"
    model = models.build(layers=4)
    demo_passes.scale(model, 1.1)
    save_model(model, other)
    return ["check", place.small, other]


OUTPUT = (
    Row("the output is the input, or a link to it", 2, "choose another `-o`",
        ("never overwritten",), lambda p: [p.small, "-o", p.small, "--force"],
        ("model_writer.check_output",)),
    Row("the output, or its manifest, exists", 2, "choose another `-o`, or `--force`",
        ("exists", "--force"), lambda p: [p.small, "-o", _touched(p)]),
    Row("the folder of the output does not exist", 2, "create it first",
        ("does not exist", "create it"),
        lambda p: [p.small, "-o", p.folder / "none" / "m.onnx"]),
    Row("`--save-recipe` names a file that exists", 2, "choose another name, or `--force`",
        ("--save-recipe", "--force"), lambda p: [p.small, "--save-recipe", _touched(p)],
        ("job.Job._check_early",)),
    Row("the model does not fit one file (2 GB)", 2, "drop `--external-data never`",
        ("does not fit one file",), _too_large, ("model_writer.save_model",)),
    Row("the disk is full, or the folder not writable", 1, "make room, or another folder",
        ("No space left on device", "nothing was kept"), full_disk),
)  # fmt: skip

VERDICTS = (
    Row("a pass changed the numbers by more than it may", 3, "the output, the error, the bound",
        ("logits", "allowed"), lambda p: [p.small, "--passes", f"{DEMO}:Wrong"],
        ("verify._Comparison._judge",)),
    Row("the outputs stop being finite on the sample data", 3, "the pass",
        ("explode", "finite"), lambda p: [p.small, "--passes", f"{DEMO}:Explode"],
        ("pipeline.Run._measure",)),
    Row("the result misses the budget", 4, "by how much; `--keep` writes it",
        ("misses the budget", "nothing was written"),
        lambda p: [p.small, "--passes", SCALE, "--budget", "relative_l2<=1e-6"],
        ("pipeline.Run._judge",)),
    Row("the result is not as fast as required", 4, "how fast it is; `--keep` writes it",
        ("1000 required",),
        lambda p: [p.small, "--passes", SCALE, "--require-speedup", "1000", "--verify", "off"],
        ("job.Job._measure_speed",)),
    Row("nothing matched, with `--fail-on-noop`", 5, "why not", ("nothing", "it is not blue"),
        lambda p: [p.small, "--passes", f"{DEMO}:Nothing", "--fail-on-noop"],
        ("pipeline.Run.execute",)),
    Row("a pass has a defect", 1, "which pass", ("crash", "defect of the pass"),
        lambda p: [p.small, "--passes", f"{DEMO}:Crash"], ("pipeline.blame",)),
    Row("a pass breaks the graph, or says something else than it did", 1, "which pass and node",
        ("liar", "modified=False"), lambda p: [p.small, "--passes", f"{DEMO}:Liar"],
        ("checks.check_pass",)),
    Row("out of memory", 1, "`--verify off` or fewer `--samples`", ("--verify off",), _exhausted),
    Row("any other defect of this program", 1, "`-v` shows the traceback to report",
        ("internal error", "-v"), _broken),
    Row("Ctrl-C", 130, "nothing was written", ("interrupted", "nothing was written"),
        lambda p: [p.small, "--passes", f"{DEMO}:Interrupted"]),
)  # fmt: skip

FAKE = Path(__file__).resolve().parent / "engines" / "fake"


def _pretend(place: Place, mode: str, *words: Any) -> Words:
    """A build with a module that stands in for TensorRT and fails in a certain way."""
    place.patch.setenv("PYTHONPATH", f"{FAKE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    place.patch.setenv("FAKE_TENSORRT", mode)
    place.patch.setenv("FAKE_TENSORRT_VERSION", "11.1.0.0")
    path = place.write(graph([_NODE("MatMul", ["x", "w"], ["y"], name="first")]))
    return ["build", path, "--target", "tensorrt", *words]


def _plan(place: Place, content: bytes, manifest: str | None = None) -> Words:
    path = place.folder / "x.engine"
    path.write_bytes(content)
    if manifest is not None:
        path.with_name("x.engine.manifest.json").write_text(manifest)
    return ["inspect", path]


def _without_tensorrt(place: Place) -> Words:
    """No module of either flavour can be found by the process that builds."""
    hidden = place.folder / "tensorrt"
    hidden.mkdir()
    (hidden / "__init__.py").write_text("raise ImportError('libnvinfer.so.11 is missing')")
    before = os.environ.get("PYTHONPATH", "")
    place.patch.setenv("PYTHONPATH", f"{place.folder}{os.pathsep}{before}")
    return ["build", place.small, "--target", "tensorrt"]


def _wrong_plugin(place: Place) -> Words:
    path = place.folder / "plugin.so"
    path.write_bytes(b"no library")
    return _pretend(place, "ok", "--plugin", path)


def _without_cuda(place: Place) -> Words:
    only = ["CPUExecutionProvider"]
    place.patch.setattr(onnxruntime, "get_available_providers", lambda: only)
    return ["bench", place.small, "--target", "ort-cuda"]


def _other_major(place: Place) -> Words:
    path = place.folder / "plugin.so"
    path.write_bytes(elf(["libc.so.6", "libnvinfer.so.10"]))
    return _pretend(place, "ok", "--plugin", path)


def _engine(
    place: Place,
    mode: str = "ok",
    *,
    gpus: int = 1,
    version: str = "10.3.0.30",
    facts: dict[str, Any] | None = None,
    shapes: tuple[str, Any] | None = None,
    length: int = 3,
    run: str = "check",
) -> Words:
    """An engine of TensorRT 10.3 on a played GPU, and the command that runs it."""
    driver = stage(place.patch, version=version)
    del driver.gpus[gpus:]
    place.patch.setenv("FAKE_TENSORRT", mode)
    from tensorrt._runtime import pack

    model = onnx.ModelProto.FromString(graph([_NODE("MatMul", ["x", "w"], ["y"], "first")]))
    if shapes is not None:
        del model.graph.node[:]
        model.graph.node.append(_NODE("Identity", ["x"], ["y"]))
        for value in (model.graph.input[0], model.graph.output[0]):
            value.type.tensor_type.shape.dim[1].dim_param = "n"
    place.write(model.SerializeToString())
    path = place.folder / "x.engine"
    if run == "build":
        return ["build", place.model, "-o", path]
    profiles = [] if shapes is None else [dict([shapes])]
    path.write_bytes(pack("10.3.0.30", profiles, (), model))
    content = {
        "engine": {"sha256": hash_file(path)}, "compute_capabilities": None, "plugins": [],
        "version_compatible": False, "profiles": profiles, **(facts or {}),
    }  # fmt: skip
    path.with_name("x.engine.manifest.json").write_text(json.dumps(content))
    return ["check", place.model, path, "--eval", place.npz(x=np.ones((2, length), np.float32))]


ENGINES = (
    Row("`build`: a target without engines", 2, "those that have", ("has no engines",),
        lambda p: ["build", p.small, "--target", "ort-cpu"], ("engines.flavours.flavour_of",)),
    Row("`--engine` for `--target jetson`", 2, "to build on the device", ("on the device",),
        lambda p: [p.small, "--target", "jetson", "--engine", p.folder / "e.engine"],
        ("engine_job.check_engine",)),
    Row("a JetPack that bundles are not made for", 2, "which they are for", ("5.1", "6.2"),
        lambda p: ["build", p.small, "--target", "jetson", "--jetpack", "5.1"],
        ("export.bundle._release",)),
    Row("`--jetpack` without `--target jetson`", 2, "leave it out", ("--jetpack is for",),
        lambda p: ["build", p.small, "--jetpack", "6.2"], ("cli.build.build_command",)),
    Row("an option for a build here, with `--target jetson`", 2, "leave it out",
        ("--compute-capability", "built on the device"),
        lambda p: ["build", p.small, "--target", "jetson", "--compute-capability", "87"],
        ("cli.build._bundle",)),
    Row("an option that this TensorRT does not obey", 2, "why, and what to use",
        ("does not have it",), lambda p: ["build", p.small, "--version-compatible"],
        ("engines.flavours.check_options",)),
    Row("`--shapes` of another form", 2, "the form", ("NAME:MIN,OPT,MAX",),
        lambda p: ["build", p.small, "--shapes", "input_ids"], ("engines.profiles.parse_shapes",)),
    Row("`--shapes` that contradict the model or each other", 2, "the axis, found and expected",
        ("axis 0 of 'x' is always 2",), lambda p: _pretend(p, "ok", "--shapes", "x:1x3"),
        ("engines.profiles._take",)),
    Row("`--engine` together with `--dry-run`", 2, "drop one", ("--dry-run",),
        lambda p: [p.small, "--engine", "x.engine", "--dry-run"], ("cli.run._engine_options",)),
    Row("`--plugin` names no file", 2, "how to build it", ("there is no file",),
        lambda p: _pretend(p, "ok", "--plugin", p.folder / "none.so"),
        ("engines.library_path.find_plugins",)),
    Row("TensorRT of another major version than the target's", 2, "`--target tensorrt`",
        ("is installed here",),
        lambda p: [*_pretend(p, "ok")[:-1], "tensorrt-10"], ("engine_job.exact_target",)),
    Row("TensorRT is not installed, or cannot be loaded", 6, "how to install it",
        ("cannot be loaded", "libnvinfer.so.11 is missing"), _without_tensorrt,
        ("engines.child._follow",)),
    Row("an operator that TensorRT does not take", 7, "the node, and the reason",
        ("node 'second' (ScatterND)",), lambda p: _pretend(p, "refuse in parser")),
    Row("TensorRT builds no engine", 7, "the node or layer, and its error",
        ("at 'layer_one'",), lambda p: _pretend(p, "refuse in build")),
    Row("TensorRT ends its own process", 7, "the node or phase it was at",
        ("SIGABRT", "node first"), lambda p: _pretend(p, "abort in parser")),
    Row("not enough memory for a build", 7, "`--max-memory`, smaller `--shapes`",
        ("not enough memory",), lambda p: _pretend(p, "killed")),
    Row("a plugin library that is none, or of another TensorRT", 7, "how to build it",
        ("plugin library",), _wrong_plugin),
    Row("`inspect`: no engine, or a damaged one", 7, "build or copy it again",
        ("is no TensorRT engine",), lambda p: _plan(p, b"junk" * 20), ("engines.plan.read_plan",)),
    Row("`inspect`: an engine that is not the one of its manifest", 7, "build or copy both again",
        ("is no manifest of an engine",),
        lambda p: _plan(p, b"ftrt" + bytes(60), "{}"), ("engines.manifest.read_manifest",)),
    Row("an engine where there is no NVIDIA driver, or no GPU", 6, "which of them",
        ("x.engine: cannot be run here", "driver shows no GPU"), lambda p: _engine(p, gpus=0),
        ("engines.loading.load_engine",)),
    Row("an engine of another version of TensorRT", 7, "both versions",
        ("TensorRT 10.3.0.30 built this engine, 11.1.0.0 is installed here",),
        lambda p: _engine(p, version="11.1.0.0"), ("engines.loading.load_engine",)),
    Row("an engine for another GPU", 7, "which it needs, and which is here",
        ("needs a GPU like the L4", "here is Played GPU (8.9)"),
        lambda p: _engine(p, facts={"gpu": {"name": "L4", "capability": "8.6"}}),
        ("engines.loading._fitting",)),
    Row("an engine that is damaged inside", 7, "build it again",
        ("the engine is damaged", "build it again"), lambda p: _engine(p, "corrupt")),
    Row("an engine that does not fit into the GPU's memory", 7, "smaller profiles",
        ("not enough memory on the GPU", "--shapes"), lambda p: _engine(p, "no gpu memory")),
    Row("an engine with a plugin that nothing registers", 7, "what is registered, and `--plugin`",
        ("lacks a plugin", "--plugin", "Registered: acme::Turn"),
        lambda p: _engine(p, "plugin missing")),
    Row("a plugin library of an engine is missing, or is another one", 7, "`--plugin`",
        ("needs the plugin library turn.so", "--plugin"),
        lambda p: _engine(p, facts={"plugins": [{"file": "turn.so", "sha256": ""}]}),
        ("engines.library_path.find_engine_plugins",)),
    Row("a plugin library for another major version of TensorRT", 7, "both versions",
        ("is built for TensorRT 10 (libnvinfer.so.10), this is TensorRT 11", "build it again"),
        _other_major),
    Row("inputs that no optimization profile of an engine takes", 2, "the range of each",
        ("no optimization profile fits: found 'x' [2, 9]", "takes [2, 1] to [2, 4]"),
        lambda p: _engine(p, shapes=("x", ((2, 1), (2, 3), (2, 4))), length=9),
        ("runners.tensorrt.TensorRTRunner._choose",)),
    Row("an engine that fails while it runs", 7, "the GPU, and what it said",
        ("the engine cannot be run on Played GPU: it failed: Error Code 7",),
        lambda p: _engine(p, "fails")),
    Row("`build`: the engine computes something else than the model", 3, "by how much",
        ("the engine's output 'y' differs", "no engine was written"),
        lambda p: [*_engine(p, "wrong engine", run="build"), "--target", "tensorrt"],
        ("engine_check.check_numbers",)),
    Row("`bench --target ort-cuda` without ONNX Runtime for CUDA", 6, "what to install",
        ("has no CUDAExecutionProvider", "optimize-onnx[gpu]"),
        _without_cuda, ("runners.ort_device.providers",)),
)  # fmt: skip

GROUPS: dict[str, tuple[Row, ...]] = {
    "The model": FILES,
    "Options and installation": OPTIONS,
    "Sample data": DATA,
    "The output": OUTPUT,
    "TensorRT engines": ENGINES,
    "Verdicts and defects": VERDICTS,
}
ROWS = tuple(row for rows in GROUPS.values() for row in rows)
#: `check` prints its answer and ends with a code, so it is no refusal.
ANSWERS = (
    Row("`check`: the models differ", 3, "by how much", ("differs", "relative_l2"), _drifted),
)  # fmt: skip


#: Only who programs with the package meets these, or nobody: the program has a way around.
INTERNAL = "internal"
_FAILS = "an engine that fails while it runs"
_NO_ENGINE = "TensorRT builds no engine"
_PROFILE = "`--shapes` that contradict the model or each other"
_PLUGIN = "a plugin library that is none, or of another TensorRT"
_NO_RT = "TensorRT is not installed, or cannot be loaded"
_CHECK = "`bisect`: the check is no command, or fails on the original model"
_FILE = "a pass from a file that does not exist, or fails"
_LACKS = "a pass from a file, or of another distribution, that lacks what a pass must have"
_SCRIPT = "a function of yours that fails, or leaves no graph"
_UNFOLDED = "a function calls itself, or unfolds to more than a million nodes"
_HF = "a Hugging Face folder without a model, or of an unknown kind"
_FACTORY = "a factory that does not exist or returns no module"
_GRAPH = "a pass breaks the graph, or says something else than it did"
_SELF = "`--calibration self` for a model that writes no text"
_TENSOR = "a tensor does not hold what its type and shape say"
_LOWER = "a model that the target, opset or form of the KV cache asked for cannot hold"
_OPTION = "an option of a pass with a wrong value"
_READ = "sample data that does not exist, or cannot be read"
_NAMES = "sample data with other names than the model's inputs"
_VERIFY = "a pass changed the numbers by more than it may"
_WRITTEN = "a size, a length or a budget that cannot be read"
_UNEXPORTED = "a module that torch cannot export"
#: Functions that refuse in other words what a row stands for: function -> the row.
VARIANTS = {
    "api._resolve": INTERNAL,
    "benchmark.compare": INTERNAL,
    "benchmark.write_result": INTERNAL,
    "bisect_job.BisectJob._check_wanted": _CHECK,
    "bisection.Bisection._halve_stages": _CHECK,
    "calibration.Calibration.drift_of": INTERNAL,
    "calibration.Reference.array": INTERNAL,
    "calibration.primary_output": INTERNAL,
    "checks._check_interface": _GRAPH,
    "checks._check_nodes": _GRAPH,
    "checks._check_values": _GRAPH,
    "checks.check_graph": _GRAPH,
    "checks.check_model": _GRAPH,
    "cli.options.parse_size": _WRITTEN,
    "cli.passes._options": _OPTION,
    "cli.tools.parse_shapes": _WRITTEN,
    "command_judge.parse_command": _CHECK,
    "deviation._aligned": _VERIFY,
    "deviation.collect": _VERIFY,
    "divergence.first_difference": INTERNAL,
    "elf.read_dynamic": INTERNAL,
    "engine_job._log": "the disk is full, or the folder not writable",
    "engine_job.build_model": "`--engine` together with `--dry-run`",
    "engine_job.build_result": INTERNAL,
    "engines.build._add_profiles": _PROFILE,
    "engines.build._config": "an option that this TensorRT does not obey",
    "engines.build._parse": "an operator that TensorRT does not take",
    "engines.build.build": _NO_ENGINE,
    "engines.cuda.Driver.__init__": "an engine where there is no NVIDIA driver, or no GPU",
    "engines.cuda.Driver.call": _FAILS,
    "engines.library._check_library": "a plugin library for another major version of TensorRT",
    "engines.library._load_rtx": INTERNAL,
    "engines.loading._content": "`inspect`: no engine, or a damaged one",
    "engines.library.check_creators": "an operator that TensorRT does not take",
    "engines.library.import_tensorrt": _NO_RT,
    "engines.library.load_plugins": _PLUGIN,
    "engines.profiles._check_sum": _PROFILE,
    "engines.profiles._dims": _PROFILE,
    "engines.profiles._range": _PROFILE,
    "engines.profiles._settle_total": _PROFILE,
    "engines.profiles.make_profiles": _PROFILE,
    "export.bundle._check_folder": "the output, or its manifest, exists",
    "export.bundle._complete_folder": "the disk is full, or the folder not writable",
    "export.bundle._plugin_sources": INTERNAL,
    "export.bundle.write_bundle": INTERNAL,
    "export.bundle_samples._profile_of": "sample data of another shape",
    "export.bundle_samples.check_profiles": INTERNAL,
    "export.bundle_samples.describe_samples": _NAMES,
    "export.support.check_supported": _LOWER,
    "external_passes._module": _FILE,
    "external_passes._parsed": _FILE,
    "external_passes._refuse_whole_script": _FILE,
    "external_passes.load_entry_point": _LACKS,
    "feeds._values": INTERNAL,
    "frontends.hf_signature._named": _UNEXPORTED,
    "frontends.hf_signature.build": _HF,
    "frontends.hf_signature.cache_shapes": _UNEXPORTED,
    "frontends.hugging_face._check_loaded": _HF,
    "frontends.hugging_face._load_config": _HF,
    "frontends.hugging_face._load_model": _HF,
    "frontends.hugging_face.detect": _HF,
    "frontends.hugging_face.export_hugging_face": _HF,
    "frontends.onnx_export.check_opset": INTERNAL,
    "frontends.onnx_export.write": "the disk is full, or the folder not writable",
    "frontends.torch_module._arguments": INTERNAL,
    "frontends.torch_module._by_parameter": INTERNAL,
    "frontends.torch_module._call_factory": _FACTORY,
    "frontends.torch_module._unpack": _FACTORY,
    "frontends.torch_module.export_torch": INTERNAL,
    "generation._Generator._feed": _SELF,
    "generation._Generator.run": _SELF,
    "generation._cache_names": _SELF,
    "graphsurgeon.Script.call": _SCRIPT,
    "graphsurgeon._refuse_what_is_dropped": _LOWER,
    "graphsurgeon.restore.put_back": _SCRIPT,
    "inputs.check_feed": _NAMES,
    "legalize._opset": _LOWER,
    "legalize._refuse_contrib": _LOWER,
    "legalize.decompose.head_counts": _LOWER,
    "custom_ops.library._checked": INTERNAL,
    "legalize.decompose.attention": _LOWER,
    "legalize.decompose.head_size": _LOWER,
    "legalize.decompose.rms_normalization": _LOWER,
    "legalize.decompose.rotary_embedding": _LOWER,
    "legalize.legalize": _LOWER,
    "legalize.opset_rules.lower": _LOWER,
    "model_functions._check_call": "MODEL is protobuf, but no valid model",
    "model_functions.check_functions": _UNFOLDED,
    "model_input._given": "a value is defined twice",
    "model_io._map_initializer": _TENSOR,
    "model_io._read": "MODEL is protobuf, but no valid model",
    "model_tensors._check_content": _TENSOR,
    "model_tensors._check_type": _TENSOR,
    "passes._class_named": "a pass from a file that has none",
    "tokens.cross_tokens.crosses_of": _OPTION,
    "tokens.cross_tokens.read_cross_tokens": _OPTION,
    "tokens.fixing.check_tokens": _OPTION,
    "tokens.options.TokenOptions.wanted": _OPTION,
    "token_picture._write": "the disk is full, or the folder not writable",
    "tokens.reduction.Reduction._searched": "a pass that needs data, without any",
    "passes.cqil._Meter.__init__": _OPTION,
    "passes.cqil._automatic": "a pass that needs data, without any",
    "passes.cqil._window": _OPTION,
    "passes.outliertune.OutlierTune.call": "a pass that needs data, without any",
    "passes.sparsify.Sparsify.call": "a pass that needs data, without any",
    "probes._check_extents": INTERNAL,
    "proto_text.mend_text": "MODEL is protobuf, but no valid model",
    "precision.protected.protected_nodes": _OPTION,
    "runners.decode.DecodeSession.__init__": _SELF,
    "runners.decode.DecodeSession._find_pairs": INTERNAL,
    "runners.decode.DecodeSession._run": INTERNAL,
    "runners.decode.DecodeSession.prefill": INTERNAL,
    "runners.ort.OrtRunner._serialize": "ONNX Runtime cannot run the model",
    "runners.ort_device.check_device": "`bench --target ort-cuda` without ONNX Runtime for CUDA",
    "runners.tensorrt.TensorRTRunner._tensor": _FAILS,
    "runners.tensorrt.TensorRTRunner.primary_output": INTERNAL,
    "runners.ort.import_onnxruntime": "ONNX Runtime, torch or transformers is not installed",
    "runners.reference.ReferenceRunner.__init__": INTERNAL,
    "runners.reference.ReferenceRunner.run": INTERNAL,
    "runners.reference._reference_operator": INTERNAL,
    "sample_sources.FolderSource.__init__": _READ,
    "sample_sources.FunctionSource.__iter__": _READ,
    "sample_sources.StackedSource.__init__": _READ,
    "sample_sources.open_npz": _READ,
    "sample_sources.open_source": INTERNAL,
    "samples.SampleSet.__init__": _NAMES,
    "samples._prepare": _NAMES,
    "verify._Comparison._bitwise": _VERIFY,
}


def table() -> Iterator[str]:
    """The lines of the README's table."""
    yield "| situation | code | the message says |"
    yield "|---|---|---|"
    for title, rows in GROUPS.items():
        yield f"| **{title}** | | |"
        for row in (*rows, *(ANSWERS if rows is VERDICTS else ())):
            yield f"| {row.what} | {row.code} | {row.advice} |"


if __name__ == "__main__":
    for line in table():
        print(line)  # noqa: T201
