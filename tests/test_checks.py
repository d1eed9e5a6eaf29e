"""Every invariant: kept by an honest pass, and its violation named."""

from __future__ import annotations

from types import SimpleNamespace

import models
import numpy as np
import onnx_ir as ir
import pytest

from optimizer import checks
from optimizer.errors import PassContractError
from optimizer.fingerprint import fingerprint, same_tensor
from optimizer.graph import lazy
from optimizer.legalize import legalize


def check(before: ir.Model, after: ir.Model, *, modified: bool = True, **declared) -> None:
    described = SimpleNamespace(**{"name": "p", "emits": (), "breaks": frozenset(), **declared})
    checks.check_pass(before, after, described, SimpleNamespace(modified=modified))


def first(model: ir.Model, op_type: str) -> ir.Node:
    return next(n for n in model.graph if n.op_type == op_type)


def rename_operator(model):
    first(model, "MatMul").op_type = "MatMull"


def foreign_operator(model):
    first(model, "MatMul").domain = "com.example"
    model.opset_imports["com.example"] = 1


def domain_without_opset(model):
    first(model, "MatMul").domain = "ai.onnx.ml"


def dangling_input(model):
    first(model, "MatMul").replace_input_with(0, ir.Value(name="nowhere"))


def read_removed_node(model):
    node = first(model, "RMSNormalization")
    model.graph.remove(node)


def unsorted(model):
    nodes = list(model.graph)
    model.graph.remove(nodes[-1])
    model.graph.insert_before(nodes[0], nodes[-1])


def two_values_one_name(model):
    first(model, "MatMul").outputs[0].name = "stream.1"


def two_nodes_one_name(model):
    nodes = [n for n in model.graph if n.op_type == "MatMul"]
    nodes[0].name = nodes[1].name


def initializer_without_data(model):
    model.graph.initializers["lm_head.weight"].const_value = None


def missing_attribute(model):
    first(model, "Cast").attributes.pop("to")


def unknown_attribute(model):
    first(model, "RMSNormalization").attributes["colour"] = ir.AttrInt64("colour", 3)


def too_few_inputs(model):
    first(model, "MatMul").resize_inputs(1)


def rename_output(model):
    model.graph.outputs[0].name = "scores"


def drop_output(model):
    del model.graph.outputs[-1]


def drop_input(model):
    # Nothing reads a cache's shape in the second layer.
    model.graph.inputs[:] = [v for v in model.graph.inputs if v.name != "position_ids"]


def reorder_inputs(model):
    model.graph.inputs[:] = list(model.graph.inputs)[::-1]


def change_type(model):
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.DOUBLE)


def forget_dimension(model):
    model.graph.outputs[0].shape = ir.Shape(["batch", "sequence", None])


def forget_rank(model):
    model.graph.outputs[0].shape = None


#: what is done to a graph, everything the message must say
VIOLATIONS = {
    rename_operator: ["MatMull", "node"],
    foreign_operator: ["com.example.MatMul", "'emits'"],
    domain_without_opset: ["ai.onnx.ml", "imports no opset"],
    dangling_input: ["MatMul", "'nowhere'", "neither an input, an initializer nor computed"],
    read_removed_node: ["RMSNormalization", "has been removed"],
    unsorted: ["computes later", "not sorted"],
    two_values_one_name: ["'stream.1'", "another value"],
    two_nodes_one_name: ["2 nodes are called"],
    initializer_without_data: ["initializer 'lm_head.weight' has no data"],
    missing_attribute: ["Cast", "'to'"],
    unknown_attribute: ["RMSNormalization", "colour"],
    too_few_inputs: ["MatMul", "input"],
    rename_output: ["outputs", "lost logits", "'breaks'"],
    drop_output: ["outputs", "lost present.1.value"],
    drop_input: ["inputs", "lost position_ids"],
    reorder_inputs: ["inputs", "reordered"],
    change_type: ["output 'logits' was FLOAT and became DOUBLE"],
    forget_dimension: ["axis 2 of output 'logits' was 50"],
    forget_rank: ["output 'logits' had shape"],
}


@pytest.mark.parametrize("change", VIOLATIONS, ids=lambda f: f.__name__)
def test_a_violation_names_the_pass_and_the_place(change):
    model = models.build(kv_cache=True)
    before = model.clone()
    change(model)
    # Types and shapes are not part of a fingerprint; something else has changed as well.
    model.metadata_props["changed"] = "yes"
    with pytest.raises(PassContractError) as error:
        check(before, model)
    message = str(error.value)
    assert message.startswith("pass 'p'")
    assert all(word in message for word in VIOLATIONS[change]), message


def test_a_legal_rewrite_passes():
    model = models.build(kv_cache=True)
    before = model.clone()
    node = first(model, "Sigmoid")
    relu = ir.node("Relu", [node.inputs[0]], name="relu")
    relu.outputs[0].name = "relu_out"
    model.graph.insert_before(node, relu)
    ir.convenience.replace_all_uses_with(node.outputs[0], relu.outputs[0])
    model.graph.remove(node)
    check(before, model)


def test_declared_operators_and_broken_invariants_are_allowed():
    model = models.build(kv_cache=True)
    before = model.clone()
    foreign_operator(model)
    check(before, model, emits=(("com.example", "MatMul"),))
    rename_output(model)
    check(before, model, emits=(("com.example", "MatMul"),), breaks=frozenset({"outputs"}))


def test_types_alone_may_be_declared_broken():
    model = models.build(kv_cache=True)
    before = model.clone()
    first(model, "Sigmoid").name = "renamed"
    change_type(model)
    check(before, model, breaks=frozenset({"output types"}))
    with pytest.raises(PassContractError, match="became DOUBLE"):
        check(before, model, breaks=frozenset({"input types"}))
    forget_rank(model)
    with pytest.raises(PassContractError, match="had shape"):
        check(before, model, breaks=frozenset({"output types"}))


def test_operators_that_were_there_before_may_stay():
    model = models.build()
    foreign_operator(model)
    before = model.clone()
    first(model, "Sigmoid").name = "renamed"
    check(before, model)


def test_a_new_dimension_may_become_known():
    model = models.build()
    before = model.clone()
    model.graph.outputs[0].shape = ir.Shape([2, "sequence", 50])
    model.metadata_props["changed"] = "yes"
    check(before, model)


class TestModified:
    def test_an_unchanged_graph_may_not_be_called_modified(self):
        model = models.build()
        with pytest.raises(PassContractError, match="modified=True, but nothing changed"):
            check(model.clone(), model)
        check(model.clone(), model, modified=False)

    def test_refreshed_shapes_count_as_a_change(self):
        model = models.build()
        before = model.clone()
        first(model, "MatMul").outputs[0].shape = ir.Shape(["batch", "sequence", 32])
        check(before, model)
        check(before, model, modified=False)

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: setattr(first(m, "MatMul"), "name", "other"),
            lambda m: first(m, "RMSNormalization").attributes.update(
                {"epsilon": ir.AttrFloat32("epsilon", 0.5)}
            ),
            lambda m: m.graph.initializers.pop("lm_head.weight"),
            lambda m: m.opset_imports.update({"": 24}),
            lambda m: m.metadata_props.update({"a": "b"}),
            lambda m: setattr(
                m.graph.initializers["lm_head.weight"],
                "const_value",
                ir.tensor(np.ones((32, 50), "f")),
            ),
        ],
        ids=["node name", "attribute", "initializer gone", "opset", "metadata", "weights"],
    )
    def test_a_change_may_not_be_denied(self, change):
        model = models.build()
        before = model.clone()
        change(model)
        with pytest.raises(PassContractError, match="modified=False, but"):
            check(before, model, modified=False)

    def test_equal_numbers_in_another_tensor_are_no_change(self):
        model = models.build()
        before = model.clone()
        weight = model.graph.initializers["lm_head.weight"]
        weight.const_value = ir.tensor(weight.const_value.numpy().copy())
        check(before, model, modified=False)


class TestFingerprint:
    def test_files_are_compared_by_place_and_not_read(self, tmp_path):
        model = models.build()
        ir.save(model, tmp_path / "m.onnx", external_data="m.data")
        a, b = (ir.load(tmp_path / "m.onnx") for _ in range(2))
        (tmp_path / "m.data").unlink()
        assert fingerprint(a).difference(fingerprint(b)) is None

    def test_lazy_tensors_are_read_only_where_they_are_others(self):
        reads = []

        def make():
            reads.append(1)
            return np.zeros(3, np.float32)

        a = lazy("a", ir.DataType.FLOAT, (3,), make)
        assert same_tensor(a, a)
        assert not reads
        assert same_tensor(a, ir.tensor(np.zeros(3, np.float32)))
        assert not same_tensor(a, ir.tensor(np.zeros(4, np.float32)))
        assert len(reads) == 1

    def test_texts_are_compared_as_such(self):
        a, b, c = (
            ir.StringTensor([b"x", last], shape=ir.Shape([2])) for last in (b"y", b"y", b"z")
        )
        assert same_tensor(a, b)
        assert not same_tensor(a, c)

    def test_nodes_of_subgraphs_count(self):
        text = (
            '<ir_version: 10, opset_import: ["" : 20]> g (bool c, float[2] x) => (float[2] y) {{'
            " y = If (c) <then_branch = t () => (float[2] a) {{ a = {}(x) }},"
            " else_branch = e () => (float[2] b) {{ b = Identity(x) }}> }}"
        )
        relu, tanh = (ir.from_onnx_text(text.format(op)) for op in ("Relu", "Tanh"))
        assert "Tanh" in str(fingerprint(relu).difference(fingerprint(tanh)))
        assert fingerprint(relu).difference(fingerprint(relu.clone())) is None


class TestLowered:
    @pytest.mark.parametrize("target", ["ort-cpu", "tensorrt-10", "tensorrt-11"])
    def test_what_legalize_writes_is_legal(self, target):
        model = models.build(kv_cache=True)
        legalize(model, target)
        checks.check_model(model, target)

    def test_contrib_operators_are_refused_where_the_target_lacks_them(self):
        model = models.build()
        first(model, "MatMul").domain = "com.microsoft"
        model.opset_imports["com.microsoft"] = 1
        checks.check_model(model, "ort-cpu")
        with pytest.raises(PassContractError, match=r"legalize for 'tensorrt-11'.*com\.microsoft"):
            checks.check_model(model, "tensorrt-11")

    def test_an_opset_above_what_the_target_takes_is_refused(self):
        with pytest.raises(PassContractError, match="opset 23, the target takes at most 20"):
            checks.check_model(models.build(), "tensorrt-10")


def test_values_of_the_outer_graph_may_be_read_in_a_subgraph():
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (bool c, float[2] x) => (float[2] y) {'
        " z = Relu(x)"
        " y = If (c) <then_branch = t () => (float[2] a) { a = Identity(z) },"
        " else_branch = e () => (float[2] b) { b = Identity(x) }> }"
    )
    checks.check_graph(model, "test")
