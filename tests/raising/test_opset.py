from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from rule_case import feed, graph, model, refuses

from optimizer.raising import opset
from optimizer.raising.base import opset_of
from optimizer.runners.ort import OrtRunner

#: node, opset it is written for, output
OLD = {
    "reduce": ("y = ReduceMean<axes = [2], keepdims = 1>(x)", 13, "float[B,S,1] y"),
    "sum": ("y = ReduceSum<axes = [-1], keepdims = 0>(x)", 11, "float[B,S] y"),
    "squeeze": ("a = Unsqueeze<axes = [0]>(x)  y = Squeeze<axes = [0]>(a)", 11, "float[B,S,4] y"),
    "softmax": ("y = Softmax<axis = 2>(x)", 11, "float[B,S,4] y"),
    "log softmax": ("y = LogSoftmax<axis = -1>(x)", 12, "float[B,S,4] y"),
    "clip": ("y = Clip<min = -0.5, max = 0.25>(x)", 9, "float[B,S,4] y"),
    "slice": ("y = Slice<starts = [1], ends = [3], axes = [2]>(x)", 9, "float[B,S,2] y"),
    "split": ("y, z = Split<axis = 2, split = [1, 3]>(x)", 11, "float[B,S,1] y, float[B,S,3] z"),
    "split evenly": ("y, z = Split<axis = 2>(x)", 13, "float[B,S,2] y, float[B,S,2] z"),
    "dropout": ("y = Dropout<ratio = 0.3>(x)", 10, "float[B,S,4] y"),
    "pad": ("y = Pad<pads = [0,0,1,0,0,2], value = 3.0>(x)", 10, "float[B,S,7] y"),
    "reshape": ("y = Reshape(x, shape)", 12, "float[B,S,2,2] y"),
    "max pool": ("y = MaxPool<kernel_shape = [2]>(x)", 9, "float[B,S,3] y"),
    "equal": ("a = Greater(x, x)  b = Not(a)  y = Where(b, x, x)", 9, "float[B,S,4] y"),
}


@pytest.mark.parametrize(("nodes", "version", "output"), OLD.values(), ids=OLD.keys())
def test_old_nodes_mean_the_same_in_the_canonical_opset(nodes, version, output):
    constants = "int64[4] shape = {0, 0, 2, 2}" if "shape)" in nodes else ""
    case = graph(nodes, output=output, constants=constants, opset=version)
    arrays = feed(case)
    wanted = ReferenceEvaluator(onnx.load_from_string(_bytes(case))).run(None, arrays)
    assert opset.run(case).applied == 1
    assert opset_of(case) == opset.CANONICAL
    after = onnx.load_from_string(_bytes(case))
    onnx.checker.check_model(after, full_check=True)
    for old, new in zip(wanted, ReferenceEvaluator(after).run(None, arrays), strict=True):
        np.testing.assert_array_equal(old, new)


def _bytes(case):
    return ir.to_proto(case).SerializeToString()


CHANGED = {
    "mask of dropout": ("z, m = Dropout(x)  y = Cast<to = 1>(m)", 10, "mask of Dropout"),
    "upsample": ("y = Upsample(x, s)", 9, "Upsample does not exist"),
    "ceil mode": (
        "y = AveragePool<kernel_shape = [2], strides = [2], ceil_mode = 1>(x)",
        11,
        "AveragePool with ceil_mode",
    ),
}


@pytest.mark.parametrize(("nodes", "version", "reason"), CHANGED.values(), ids=CHANGED.keys())
def test_one_operator_that_changed_keeps_the_model_at_its_opset(nodes, version, reason):
    constants = "float[3] s = {1, 1, 1}" if "Upsample" in nodes else ""
    output = "float[B,S,2] y" if "Pool" in nodes else "float[B,S,4] y"
    case = graph(nodes, output=output, constants=constants, opset=version)
    before = _bytes(case)
    report = opset.run(case)
    assert report.applied == 0
    assert reason in report.skipped[0].reason
    assert f"keeps opset {version}" in report.skipped[0].reason
    assert _bytes(case) == before


@pytest.mark.parametrize("version", [23, 24])
def test_a_canonical_model_is_not_touched(version):
    case = graph("y = Relu(x)", opset=version)
    assert opset.run(case).applied == 0
    assert opset_of(case) == version


def _softmax(array):
    shifted = np.exp(array - array.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("axis", "batch"), [("<axis = 1>", 2), ("", 2), ("<axis = 0>", 2), ("<axis = 1>", 0)]
)
def test_a_softmax_over_several_axes_is_one_over_their_product(axis, batch):
    case = graph(f"y = Softmax{axis}(x)", inputs="float[B,3,4] x", output="float[B,3,4] y", opset=9)
    assert opset.run(case).applied == 1
    array = np.random.default_rng(0).normal(size=(batch, 3, 4)).astype(np.float32)
    rows = array.reshape((1, -1) if axis == "<axis = 0>" else (batch, 12))
    found = OrtRunner(case).run({"x": array})["y"]
    # Two ways to sum the same twelve numbers differ by a few roundings of one.
    np.testing.assert_allclose(found, _softmax(rows).reshape(array.shape), rtol=0, atol=1e-6)


def test_a_softmax_in_a_branch_is_adapted_where_it_is():
    case = model(
        """g (bool p, float[2,3,4] x) => (float[2,3,4] y) {
            y = If (p) <
                then_branch = a () => (float[2,3,4] u) { u = Softmax<axis = 1>(x) },
                else_branch = b () => (float[2,3,4] v) { v = LogSoftmax<axis = 1>(x) }
            > }""",
        opset=11,
    )
    assert opset.run(case).applied == 1
    onnx.checker.check_model(onnx.load_from_string(_bytes(case)), full_check=True)


def test_operators_in_branches_are_adapted_too():
    case = model(
        """g (bool p, float[2,3] x) => (float[2,1] y) {
            y = If (p) <
                then_branch = a () => (float[2,1] u) { u = ReduceMax<axes = [1]>(x) },
                else_branch = b () => (float[2,1] v) { v = ReduceMin<axes = [1]>(x) }
            > }""",
        opset=13,
    )
    assert opset.run(case).applied == 1
    onnx.checker.check_model(onnx.load_from_string(_bytes(case)), full_check=True)


def test_every_operator_that_changed_is_adapted_refused_or_extends_its_older_self():
    """Whatever ONNX changed before 23 is either known here or compatible by its signature."""
    unknown = []
    history: dict[str, list] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and not schema.deprecated and schema.since_version <= 23:
            history.setdefault(schema.name, []).append(schema)
    for name, schemas in sorted(history.items()):
        schemas.sort(key=lambda s: s.since_version)
        for old in schemas[:-1]:
            known = name in opset._ADAPTERS or name in opset._CHECKS or name in opset._CHANGED
            if old.since_version >= 7 and not known and not opset._extends(old, schemas[-1]):
                unknown.append((name, old.since_version))
    # These are refused by their signature; a model with one of them keeps its opset.
    assert unknown == [("DFT", 17), ("Upsample", 7)]


@pytest.mark.parametrize("op_type", sorted(opset._LEFT_BEHIND))
def test_an_operator_without_a_newer_kernel_keeps_the_model_at_its_opset(op_type):
    old, new = (onnx.defs.get_schema(op_type, version, "") for version in (21, 23))
    assert old.since_version < 22 <= new.since_version


@pytest.mark.parametrize("op_type", ["Softsign", "LeakyRelu"])
def test_activations_that_only_run_in_float64_while_they_are_functions_stay(op_type):
    case = graph(f"y = {op_type}(x)", inputs="double[B,4] x", output="double[B,4] y", opset=18)
    assert f"no {op_type} of opset 23" in opset.run(case).skipped[0].reason
    assert OrtRunner(case).run({"x": np.ones((1, 4))})["y"].shape == (1, 4)


def test_a_region_of_interest_stays_where_the_runtime_has_a_kernel():
    nodes = "y = RoiAlign<output_height = 2, output_width = 2>(x, r, i)"
    case = graph(
        nodes,
        inputs="float[1,1,4,4] x, float[N,4] r, int64[N] i",
        output="float[N,1,2,2] y",
        opset=16,
    )
    assert "does not exist in ONNX Runtime in" in opset.run(case).skipped[0].reason
    OrtRunner(case)


BRANCH = """g (bool p, double[3] x) => (double[3] y) {{
    y = If (p) <
        then_branch = a () => (double[3] u) {{ k = Neg(x)  l = {node}  u = Neg(l) }},
        else_branch = b () => (double[3] v) {{ v = Neg(x) }}
    > }}"""


@pytest.mark.parametrize(
    "node", ["Clip<min = -0.5>(k)", "Clip<max = 0.5>(k)", "Pad<pads = [0, 0], value = 0.0>(k)"]
)
def test_a_limit_in_a_branch_is_not_given_a_type_that_is_a_guess(node):
    case = model(BRANCH.format(node=node), opset=10)
    refuses(case, opset.run, "gives is not known; the model keeps opset 10")


@pytest.mark.parametrize("node", ["Clip<min = -0.5>(x)", "Pad<pads = [0, 0], value = 0.0>(x)"])
def test_a_limit_in_a_branch_has_the_type_of_what_it_limits(node):
    case = model(BRANCH.format(node=node), opset=10)
    assert opset.run(case).applied == 1
    onnx.checker.check_model(onnx.load_from_string(_bytes(case)), full_check=True)
