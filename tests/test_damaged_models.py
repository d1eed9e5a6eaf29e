"""Models damaged in their structure: refused in one sentence, or read as they are meant."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import onnx_ir as ir
import pytest
from conftest import Outcome
from fuzzing import corpus, hostile
from fuzzing.bombs import deep_branches, nested_functions
from fuzzing.files import FLOAT, holding
from refusals import model_of, refusal, written

from optimizer import errors
from optimizer.errors import ModelError, UnsupportedError
from optimizer.model_io import load_model
from optimizer.model_tensors import held_tensors
from optimizer.pass_base import Context
from passes.canonicalize import Canonicalize

X = np.arange(4, dtype=np.float32)


def test_names_are_printed_without_what_a_terminal_obeys(
    tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    name = "a\x1b[2J\x1b]0;title\x07\nb\u202e"
    path = written(tmp_path, model_of([oh.make_node("Relu", [name], ["y"])]))
    found = command(path)
    assert found.code == 2
    assert len(found.lines) == 1
    assert found.lines[0].isprintable()
    assert "\\x1b[2J" in found.err


@pytest.mark.parametrize("words", [[], ["inspect"]])
def test_names_of_a_model_that_is_shown_are_printed_so_too(
    tmp_path: Path, command: Callable[..., Outcome], words: list[str]
) -> None:
    model = model_of([oh.make_node("Cast", ["x"], ["y"], "n\x1b[2J", to=FLOAT)])
    model.graph.input[0].name = model.graph.node[0].input[0] = "x\x1b[2J[/bold]"
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N\x1b"
    found = command(*words, written(tmp_path, model), *([] if words else ["--explain"]))
    assert found.code == 0
    assert all(c.isprintable() or c == "\n" for c in found.out + found.err)


def test_a_message_is_at_most_a_few_lines_long() -> None:
    text = str(ModelError("where: " + "x" * 10_000 + "; what to do"))
    assert len(text) < 700
    assert text.startswith("where: x")
    assert text.endswith("; what to do")
    assert errors.printable("plain text") == "plain text"


TWICE = {
    "two nodes": lambda m: m.graph.node.append(oh.make_node("Neg", ["x"], ["a"])),
    "a node and an input": lambda m: m.graph.node.append(oh.make_node("Neg", ["a"], ["x"])),
    "a node and an initializer": lambda m: m.graph.node.append(oh.make_node("Neg", ["x"], ["w"])),
    "two inputs": lambda m: m.graph.input.append(m.graph.input[0]),
    "two initializers": lambda m: m.graph.initializer.append(m.graph.initializer[0]),
}


@pytest.mark.parametrize("what", TWICE)
def test_a_name_that_is_defined_twice_is_refused(tmp_path: Path, what: str) -> None:
    nodes = [oh.make_node("Relu", ["x"], ["a"]), oh.make_node("Add", ["a", "w"], ["y"])]
    model = model_of(nodes, w=np.ones(1, np.float32))
    TWICE[what](model)
    assert "twice" in refusal(written(tmp_path, model))


INVALID = {
    "a required input is left out": (
        [oh.make_node("Add", ["x", ""], ["y"])], "lacks its input 1, B"),
    "an input too many": ([oh.make_node("Relu", ["x", "x"], ["y"])], "input size 2"),
    "an attribute of another type": (
        [oh.make_node("Softmax", ["x"], ["y"], axis=1.5)], "axis"),
    "an attribute that refers to no function": (
        [onnx.NodeProto(op_type="Cast", input=["x"], output=["y"], attribute=[
            onnx.AttributeProto(name="to", type="INT", ref_attr_name="t")])],
        "attribute of no function"),
    "a Constant without a value": (
        [oh.make_node("Constant", [], ["c"]), oh.make_node("Add", ["x", "c"], ["y"])],
        "has 0 values"),
    "a Cast to no type": ([oh.make_node("Cast", ["x"], ["y"], to=1000)], "element type 1000"),
    "a domain that is not imported": (
        [oh.make_node("FastGelu", ["x"], ["y"], domain="com.microsoft")],
        "imports no operator set"),
    "a value that waits for itself": (
        [oh.make_node("Add", ["x", "b"], ["a"]), oh.make_node("Relu", ["a"], ["b"]),
         oh.make_node("Neg", ["b"], ["y"])], "cycle"),
}  # fmt: skip


@pytest.mark.parametrize("what", INVALID)
def test_an_invalid_node_is_named(tmp_path: Path, what: str) -> None:
    nodes, reason = INVALID[what]
    assert reason in refusal(written(tmp_path, model_of(nodes)))


TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "a negative dimension": ({"dims": [-4], "raw_data": b"0" * 16}, "no negative dimension"),
    "too few bytes": ({"dims": [4], "raw_data": b"0" * 15}, "15 bytes, expected 16"),
    "too few numbers": ({"dims": [4], "float_data": [1.0]}, "1 numbers, expected 4"),
    "no numbers of many": ({"dims": [2**40]}, "0 numbers"),
    "dimensions whose product is beyond all numbers": ({"dims": [2**62, 2**62]}, "0 numbers"),
    "no type": ({"dims": [4], "data_type": 0, "raw_data": b"0" * 16}, ""),
    "an unknown type": ({"dims": [4], "data_type": 99, "raw_data": b"0" * 16}, ""),
    "strings that are missing": ({"dims": [4], "data_type": 8, "string_data": [b"x"]}, "1 strings"),
}


@pytest.mark.parametrize("what", TENSORS)
@pytest.mark.parametrize("where", ["initializer", "branch", "attribute", "function", "unused"])
def test_tensors_that_do_not_hold_what_they_say_are_refused(
    tmp_path: Path, what: str, where: str
) -> None:
    fields, reason = TENSORS[what]
    tensor = onnx.TensorProto(**{"name": "w", "data_type": FLOAT, **fields})
    path = tmp_path / "m.onnx"
    path.write_bytes(holding(tensor, where))
    assert reason in refusal(path)


def test_a_large_tensor_that_holds_its_numbers_twice_is_refused(tmp_path: Path) -> None:
    model = model_of([oh.make_node("Add", ["x", "w"], ["y"])], w=np.ones(1000, np.float32))
    model.graph.initializer[0].float_data.extend([2.0] * 1000)
    assert "twice" in refusal(written(tmp_path, model))


@pytest.mark.parametrize("recursive", [False, True])
def test_functions_that_unfold_without_end_are_refused(tmp_path: Path, recursive: bool) -> None:
    (tmp_path / "m.onnx").write_bytes(nested_functions(40, recursive=recursive).model)
    kind = ModelError if recursive else UnsupportedError
    text = refusal(tmp_path / "m.onnx", kind)
    assert ("calls itself" if recursive else "e+12 nodes") in text


@pytest.mark.parametrize("nested", [False, True])
def test_a_call_without_what_a_node_in_the_function_needs_is_refused(
    tmp_path: Path, nested: bool
) -> None:
    opsets = [oh.make_opsetid("", 18), oh.make_opsetid("own", 1)]
    inner = oh.make_function(
        "own", "linear", ["x", "w", "b"], ["y"],
        [oh.make_node("MatMul", ["x", "w"], ["h"]), oh.make_node("Clip", ["h", "b"], ["y"])],
        opsets,
    )  # fmt: skip
    outer = oh.make_function(
        "own", "layer", ["x", "w", "b"], ["y"],
        [oh.make_node("linear", ["x", "w", "b"], ["y"], domain="own")], opsets,
    )  # fmt: skip
    for left_out, refused in (("x", True), ("b", False)):
        words = ["" if name == left_out else name for name in ("x", "x", "b")]
        model = model_of([
            oh.make_node("Identity", ["x"], ["b"]),
            oh.make_node("layer" if nested else "linear", words, ["y"], "call", domain="own"),
        ])  # fmt: skip
        model.functions.extend([inner, outer])
        model.opset_import.append(oh.make_opsetid("own", 1))
        path = written(tmp_path, model)
        if refused:
            assert "node 'call' lacks input 0 of function" in refusal(path)
        else:
            load_model(path)


def test_an_attribute_of_the_wrong_type_of_a_runtime_operator_is_refused(tmp_path: Path) -> None:
    node = oh.make_node("FusedMatMul", ["x", "x"], ["y"], "n", domain="com.microsoft", transB=[1])
    model = model_of([node])
    model.opset_import.append(oh.make_opsetid("com.microsoft", 1))
    text = refusal(written(tmp_path, model))
    assert "'n' (FusedMatMul) has the attribute 'transB' as INTS, expected INT" in text


@pytest.mark.parametrize(("op_type", "words", "lacks"), [
    ("FusedMatMul", ["", "x"], 0), ("FusedMatMul", ["x"], 1),
    ("SkipLayerNormalization", ["x", "x"], 2), ("RotaryEmbedding", ["x", "x", "", "x"], 2),
])  # fmt: skip
def test_runtime_operators_without_an_input_that_they_need_are_refused(
    tmp_path: Path, op_type: str, words: list[str], lacks: int
) -> None:
    model = model_of([oh.make_node(op_type, words, ["y"], "n", domain="com.microsoft")])
    model.opset_import.append(oh.make_opsetid("com.microsoft", 1))
    assert f"({op_type}) lacks its input {lacks}" in refusal(written(tmp_path, model))


def test_a_call_with_more_than_the_function_takes_is_refused(tmp_path: Path) -> None:
    model = onnx.ModelProto.FromString(nested_functions(2, recursive=False).model)
    model.graph.node[0].input.append("x")
    assert "more than function 'f1'" in refusal(written(tmp_path, model))


def test_branches_deeper_than_protobuf_reads_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(deep_branches(60))
    refusal(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes(deep_branches(10))
    Canonicalize().call(load_model(tmp_path / "m.onnx"), Context())


def test_nodes_in_any_order_are_sorted(tmp_path: Path) -> None:
    nodes = [oh.make_node("Neg", ["a"], ["y"]), oh.make_node("Relu", ["x"], ["a"])]
    model = load_model(written(tmp_path, model_of(nodes)))
    assert [node.op_type for node in model.graph] == ["Relu", "Neg"]


def test_the_long_name_of_the_standard_domain_is_understood(tmp_path: Path) -> None:
    model = model_of([oh.make_node("Relu", ["x"], ["y"], domain="ai.onnx")])
    model.opset_import[0].domain = "ai.onnx"
    loaded = load_model(written(tmp_path, model))
    assert loaded.opset_imports[""] == 20
    assert [node.domain for node in loaded.graph] == [""]


def test_a_length_of_minus_one_is_any_length(tmp_path: Path) -> None:
    model = model_of([oh.make_node("Relu", ["x"], ["y"])])
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = -1
    loaded = load_model(written(tmp_path, model))
    assert [value.shape[0].value for value in (*loaded.graph.inputs, *loaded.graph.outputs)] == [
        None,
        None,
    ]


def test_outputs_without_a_shape_are_accepted(tmp_path: Path) -> None:
    model = model_of([oh.make_node("Relu", ["x"], ["y"])])
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert load_model(written(tmp_path, model)).graph.outputs[0].shape is None


def test_the_type_of_an_initializer_is_that_of_its_numbers(tmp_path: Path) -> None:
    model = model_of([oh.make_node("Add", ["x", "w"], ["y"])], w=np.ones(1, np.float32))
    model.graph.value_info.append(oh.make_tensor_value_info("w", onnx.TensorProto.INT8, [3]))
    value = load_model(written(tmp_path, model)).graph.initializers["w"]
    assert (value.dtype, list(value.shape)) == (ir.DataType.FLOAT, [1])


def sparse(index: np.ndarray, dims: list[int], count: int = 2) -> onnx.ModelProto:
    model = model_of([oh.make_node("Add", ["x", "w"], ["y"])])
    values = onh.from_array(np.arange(1, count + 1, dtype=np.float32), "w")
    model.graph.sparse_initializer.append(
        oh.make_sparse_tensor(values, onh.from_array(index, "i"), dims)
    )
    return model


@pytest.mark.parametrize("index", [np.array([1, 5]), np.array([[0, 1], [1, 2]])])
def test_sparse_initializers_become_dense(tmp_path: Path, index: np.ndarray) -> None:
    model = load_model(written(tmp_path, sparse(index, [2, 3])))
    assert model.graph.initializers["w"].const_value.numpy().tolist() == [[0, 1, 0], [0, 0, 2]]


def test_sparse_constants_become_dense(tmp_path: Path) -> None:
    model = sparse(np.array([1, 5]), [2, 3])
    held = model.graph.sparse_initializer.pop()
    model.graph.node.insert(0, oh.make_node("Constant", [], ["w"], sparse_value=held))
    loaded = load_model(written(tmp_path, model))
    (tensor,) = [held.tensor for held in held_tensors(loaded)]
    assert tensor.numpy().tolist() == [[0, 1, 0], [0, 0, 2]]


SPARSE = {
    "outside": (sparse(np.array([1, 6]), [2, 3]), ModelError, "outside of it"),
    "before": (sparse(np.array([[0, 1], [0, -1]]), [2, 3]), ModelError, "outside of it"),
    "without a place": (sparse(np.array([1, 2, 3]), [2, 3]), ModelError, "without a place"),
    "far too large": (sparse(np.array([1, 2]), [10**6, 10**6]), UnsupportedError, "bytes in dense"),
}


@pytest.mark.parametrize("what", SPARSE)
def test_sparse_initializers_that_make_no_sense_are_refused(tmp_path: Path, what: str) -> None:
    model, kind, reason = SPARSE[what]
    assert reason in refusal(written(tmp_path, model), kind)


@pytest.mark.parametrize("number", range(12))
def test_notes_that_are_not_ours_count_as_not_there(
    tmp_path: Path, number: int, command: Callable[..., Outcome]
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(hostile.notes(random.Random(number)).model)
    assert command(path).code == 0
    assert command("inspect", path).code == 0


def test_nodes_of_one_name_get_names_of_their_own(
    tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    """ONNX Runtime takes them only so."""
    nodes = [oh.make_node("Relu", ["x"], ["a"], "n"), oh.make_node("Neg", ["a"], ["b"], "n")]
    nodes += [oh.make_node("Abs", ["b"], ["c"], "n_1"), oh.make_node("Neg", ["c"], ["y"])]
    path = written(tmp_path, model_of(nodes))
    assert [node.name for node in load_model(path).graph][:3] == ["n", "n_2", "n_1"]
    assert command(path).code == 0


def test_strings_pass_through(tmp_path: Path, command: Callable[..., Outcome]) -> None:
    seed = next(seed for seed in corpus.fixed_seeds() if seed.name == "sequences")
    (tmp_path / "m.onnx").write_bytes(seed.model)
    assert command(tmp_path / "m.onnx").code == 0


def test_inputs_too_large_to_make_up_are_not_verified(
    tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    model = model_of([oh.make_node("Relu", ["x"], ["y"])])
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2**40
    found = command(written(tmp_path, model))
    assert found.code == 0
    assert "not verified" in found.out or "unchanged" in found.out


def test_a_call_with_an_attribute_of_another_type_is_refused(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20, "own" : 1]>
        g (float[2] x) => (float[2] y) { y = own.leak <slope = [0.5]> (x) }
        <domain: "own", opset_import: ["" : 20]>
        leak <slope> (x) => (y) { y = LeakyRelu <alpha : float = @slope> (x) }
    """)
    assert "'slope' as FLOATS, expected FLOAT" in refusal(written(tmp_path, model))


@pytest.mark.parametrize("constant", ["value_float = nan", "value = float[2] {1, nan}"])
def test_constants_are_no_more_nan_than_initializers_are(tmp_path: Path, constant: str) -> None:
    constant = constant.replace("nan", "7.5")
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[2] x) => (float[2] y) {{ c = Constant <{constant}> ()  y = Add(x, c) }}
    """)
    sound, damaged = (np.float32(number).tobytes() for number in (7.5, np.nan))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString().replace(sound, damaged))
    assert "Constant 'c'" in refusal(tmp_path / "m.onnx")


def _note(message: Any) -> None:
    entry = message.metadata_props.add()
    entry.key, entry.value = "note", "MARK"


COMMENTS: dict[str, Callable[[onnx.ModelProto], None]] = {
    "of the model": lambda m: setattr(m, "doc_string", "MARK"),
    "of the graph": lambda m: setattr(m.graph, "doc_string", "MARK"),
    "whose model it is": lambda m: setattr(m, "domain", "MARK"),
    "metadata of the model": _note,
    "metadata of the graph": lambda m: _note(m.graph),
}


def _latin(tmp_path: Path, model: onnx.ModelProto) -> Path:
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString().replace(b"MARK", b"M\xc4RK"))
    return path


@pytest.mark.parametrize("edit", COMMENTS.values(), ids=COMMENTS.keys())
def test_comments_that_are_not_utf8_do_no_harm(
    tmp_path: Path, edit: Callable[[onnx.ModelProto], None]
) -> None:
    model = model_of([oh.make_node("Relu", ["x"], ["y"])])
    edit(model)
    loaded = load_model(_latin(tmp_path, model))
    Canonicalize().call(loaded, Context())
    assert "M\ufffdRK" in str(ir.to_proto(loaded))


def test_names_in_annotations_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    model = model_of([oh.make_node("Relu", ["x"], ["y"])])
    annotation = model.graph.quantization_annotation.add(tensor_name="y")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="MARK")
    assert "an annotation of 'y' is not text" in refusal(_latin(tmp_path, model))


def test_a_tensor_with_two_sets_of_numbers_is_refused(tmp_path: Path) -> None:
    model = model_of([oh.make_node("Add", ["x", "w"], ["y"])], w=X)
    model.graph.initializer[0].raw_data = X.tobytes()
    model.graph.initializer[0].float_data.extend(X)
    assert "'w' holds numbers in float_data and raw_data" in refusal(written(tmp_path, model))
