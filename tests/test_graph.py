from __future__ import annotations

import gc
import weakref

import numpy as np
import onnx_ir as ir
import pytest
from rule_case import graph, model, only

from optimizer import graph as graphs


def _external(tmp_path, array: np.ndarray) -> ir.ExternalTensor:
    (tmp_path / "w.bin").write_bytes(array.tobytes())
    return ir.ExternalTensor(
        "w.bin",
        0,
        array.nbytes,
        ir.DataType.FLOAT,
        shape=ir.Shape(array.shape),
        name="w",
        base_dir=tmp_path,
    )


def test_const_reads_initializers_and_constant_nodes_only():
    case = graph(
        "c = Constant<value_ints = [1, 2]>()  a = Mul(x, w)  y = Reshape(a, c)",
        output="float[1,2] y",
        inputs="float[2] x",
        constants="float w = {3}",
    )
    np.testing.assert_array_equal(graphs.const(case.graph[0].outputs[0]), [1, 2])
    assert graphs.scalar(case.graph[1].inputs[1]) == 3
    assert graphs.const(case.graph.inputs[0]) is None
    assert graphs.const(case.graph[1].outputs[0]) is None
    assert graphs.const(None) is None


@pytest.mark.parametrize(("shape", "number"), [((), 2.5), ((1,), 2.5), ((1, 1), 2.5), ((2,), None)])
def test_scalar_takes_one_element_of_any_rank(shape, number):
    value = ir.Value(name="v", const_value=ir.tensor(np.full(shape, 2.5, np.float32)))
    assert graphs.scalar(value) == number


def test_an_initializer_that_callers_may_override_is_no_constant():
    case = graph("y = Relu(x)")
    value = case.graph.inputs[0]
    value.const_value = ir.tensor(np.ones((1, 1, 4), np.float32), name="x")
    case.graph.register_initializer(value)
    assert graphs.const(value) is None


def test_lazy_tensors_are_computed_when_read_and_not_kept():
    calls = []

    def numbers():
        calls.append(1)
        return np.ones((2, 3), np.float32)

    tensor = graphs.lazy("w", ir.DataType.FLOAT, (2, 3), numbers)
    assert not calls
    assert tensor.nbytes == 24
    assert tensor.numpy().shape == (2, 3)
    assert tensor.tobytes() == np.ones(6, np.float32).tobytes()
    assert len(calls) == 2


def test_a_lazy_tensor_of_another_shape_than_declared_is_an_error():
    tensor = graphs.lazy("w", ir.DataType.FLOAT, (3,), lambda: np.ones(2, np.float32))
    with pytest.raises(ValueError, match="lazy tensor 'w'"):
        tensor.numpy()


def test_derived_tensors_let_go_of_the_file_after_each_read(tmp_path):
    external = _external(tmp_path, np.arange(6, dtype=np.float32).reshape(2, 3))
    value = ir.Value(name="w", const_value=external)
    tensor = graphs.derived(value, (3, 2), np.transpose)
    assert external.raw is None
    np.testing.assert_array_equal(tensor.numpy(), [[0, 3], [1, 4], [2, 5]])
    assert external.raw is None


def test_release_keeps_arrays_that_somebody_holds(tmp_path):
    external = _external(tmp_path, np.arange(6, dtype=np.float32))
    array = external.numpy()
    graphs.release(external)
    np.testing.assert_array_equal(array, np.arange(6))
    np.testing.assert_array_equal(external.numpy(), np.arange(6))


def test_names_are_unique_across_branches_and_repeatable():
    text = """g (bool p, float[2] x) => (float[2] y) {
        y = If (p) < then_branch = a () => (float[2] u) { u = Relu(x) },
                     else_branch = b () => (float[2] v) { v = Tanh(x) } > }"""
    first, second = model(text), model(text)
    for case in (first, second):
        assert graphs.unique_name(case.graph, "u") == "u_1"
        assert graphs.unique_name(case.graph, "u") == "u_2"
        assert graphs.unique_name(case.graph, "new") == "new"
        assert graphs.unique_name(case.graph, "new") == "new_1"


def test_names_do_not_keep_graphs_alive():
    case = graph("y = Relu(x)")
    graphs.unique_name(case.graph, "a")
    alive = weakref.ref(case.graph)
    del case
    gc.collect()
    assert alive() is None


def test_insert_puts_the_node_before_its_anchor():
    case = graph("a = Relu(x)  y = Tanh(a)")
    anchor = only(case, "Tanh")
    value = graphs.insert(
        case.graph, anchor, "Exp", (anchor.inputs[0],), dtype=ir.DataType.FLOAT, shape=["B", 4]
    )
    assert [node.op_type for node in case.graph] == ["Relu", "Exp", "Tanh"]
    assert value.name == "y_1"
    assert list(value.shape) == ["B", 4]


def test_insert_returns_all_outputs():
    case = graph("y = Relu(x)")
    parts = graphs.insert(
        case.graph, None, "Split", case.graph.inputs, {"num_outputs": 2}, outputs=2, name="part"
    )
    assert [value.name for value in parts] == ["part_0", "part_1"]
    assert parts[0].producer() is parts[1].producer()


def test_add_initializer_takes_arrays_and_tensors():
    case = graph("y = Relu(x)")
    first = graphs.add_initializer(case.graph, "w", np.ones(3, np.float32))
    second = graphs.add_initializer(case.graph, "w", ir.tensor([1, 2]))
    assert [first.name, second.name] == ["w", "w_1"]
    assert second.const_value.name == "w_1"
    assert list(case.graph.initializers) == ["w", "w_1"]


def test_replacing_an_output_keeps_its_name_and_shape():
    case = graph("y = Relu(x)")
    old = case.graph.outputs[0]
    new = graphs.insert(case.graph, old.producer(), "Tanh", case.graph.inputs)
    graphs.replace_value(old, new)
    assert case.graph.outputs[0] is new
    assert (new.name, new.shape) == ("y", old.shape)
    assert old.name != "y"


@pytest.mark.parametrize("source", ["input", "initializer", "output"])
def test_replacing_an_output_by_a_named_value_adds_an_identity(source):
    case = graph("y = Relu(x)  z = Tanh(x)", output="float[B,S,4] y, float[B,S,4] z")
    values = {
        "input": case.graph.inputs[0],
        "initializer": graphs.add_initializer(case.graph, "w", np.ones((1, 1, 4), np.float32)),
        "output": case.graph.outputs[1],
    }
    graphs.replace_value(case.graph.outputs[0], values[source])
    assert [value.name for value in case.graph.outputs] == ["y", "z"]
    assert only(case, "Identity").inputs[0] is values[source]


def test_what_reads_a_replaced_output_comes_before_the_identity_that_carries_it():
    case = graph("y = Relu(x)  z = Tanh(y)", output="float[B,S,4] y, float[B,S,4] z")
    graphs.replace_value(case.graph.outputs[0], case.graph.inputs[0])
    assert only(case, "Tanh").inputs[0] is case.graph.inputs[0]
    assert [node.op_type for node in case.graph] == ["Relu", "Tanh", "Identity"]


def test_a_replacement_may_take_the_name():
    case = graph("a = Relu(x)  y = Tanh(a)")
    old = only(case, "Relu").outputs[0]
    new = graphs.insert(case.graph, old.producer(), "Exp", case.graph.inputs, name="fresh")
    graphs.replace_value(old, new, keep_name=True)
    assert (new.name, old.name) == ("a", "fresh")
    assert only(case, "Tanh").inputs[0] is new


def test_only_user_needs_one_reader_and_no_output():
    case = graph("a = Relu(x)  b = Tanh(a)  y = Add(b, b)")
    values = {output.name: output for node in case.graph for output in node.outputs}
    assert graphs.only_user(values["a"]) is only(case, "Tanh")
    assert graphs.only_user(values["b"]) is None
    assert graphs.only_user(values["y"]) is None


def test_dead_nodes_branches_and_initializers_go_away():
    case = model(
        """g (bool p, float[2] x) => (float[2] y) <float[2] w = {1, 2}, float[2] k = {1, 2}> {
            a = Mul(x, w)
            dead = If (p) < then_branch = t () => (float[2] u) { u = Relu(a) },
                            else_branch = e () => (float[2] v) { v = Tanh(a) } >
            y = Add(x, k) }"""
    )
    assert graphs.remove_dead(case) == 3
    assert [node.op_type for node in case.graph] == ["Add"]
    assert list(case.graph.initializers) == ["k"]
    assert graphs.remove_dead(case) == 0


def test_size_counts_initializers_of_branches():
    case = graph("y = Mul(x, w)", constants="float[4] w = {1, 2, 3, 4}")
    assert graphs.size_bytes(case) == 16
