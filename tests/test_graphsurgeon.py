"""Functions for onnx-graphsurgeon as steps: what gets through, what is put back or refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
from conftest import Outcome

from optimizer import checks
from optimizer.conformance import MODELS
from optimizer.conformance.behaviour import watched
from optimizer.conformance.models import Sample
from optimizer.errors import OptionError, ScriptError, UnsupportedError
from optimizer.fingerprint import fingerprint, same_tensor
from optimizer.graph import lazy
from optimizer.graphsurgeon import pass_of_function
from optimizer.model_io import load_model, save_model
from optimizer.pass_base import Context, Exactness, Report
from optimizer.runners.ort import OrtRunner

NAMES = [sample.name for sample in MODELS]


def run(function: Any, model: ir.Model, **options: Any) -> Report:
    made = pass_of_function(function, "function")
    return made(made.Options(**options)).call(model, Context())


def sample(name: str) -> Sample:
    return MODELS[NAMES.index(name)]


def parsed(text: str) -> ir.Model:
    head = '<ir_version: 10, opset_import: ["" : 18]>\n'
    return ir.from_proto(onnx.parser.parse_model(head + text))


def nothing(graph):
    """Changes nothing."""


def same(graph: gs.Graph) -> gs.Graph:
    return graph


def scale_head(graph: gs.Graph, factor: float = 2.0) -> None:
    (head,) = (node for node in graph.nodes if node.outputs[0].name == "logits")
    head.inputs[1].values = head.inputs[1].values * np.float32(factor)


def swap_additions(graph):
    for node in graph.nodes:
        if node.op == "Add":
            node.inputs = [node.inputs[1], node.inputs[0]]
    return graph


# Through it and back


@pytest.mark.parametrize("function", [nothing, same])
@pytest.mark.parametrize("one", MODELS, ids=NAMES)
def test_a_function_that_does_nothing_leaves_every_model_as_it_was(
    one: Sample, function: Any
) -> None:
    model = one.build()
    report = run(function, model)
    assert not report.modified
    assert "changed nothing" in report.skipped[0].reason
    assert fingerprint(one.build()).difference(fingerprint(model)) is None


@pytest.mark.parametrize("one", MODELS, ids=NAMES)
def test_a_change_of_one_name_is_all_that_changes(one: Sample) -> None:
    """The graph that comes back is used, so everything else in it must be as it was."""
    model, original = one.build(), one.build()
    if len(model.graph) == 0:
        assert not run(nothing, model).modified
        return

    def rename(graph):
        graph.nodes[0].name = "renamed"

    for value in (*model.graph.inputs, *model.graph.node(0).outputs):
        value.metadata_props["note"] = f"about {value.name}"
    model.graph.node(-1).metadata_props["note"] = "about the last"
    model.metadata_props["optimize.kv_groups"] = "{}"
    report = run(rename, model)
    assert report.modified
    assert model.metadata_props == {"optimize.kv_groups": "{}"}
    assert (
        model.graph.node(-1).metadata_props == {"note": "about the last"} or len(model.graph) == 1
    )
    for value in (*model.graph.inputs, *model.graph.node(0).outputs):
        assert value.metadata_props == {"note": f"about {value.name}"}
    model.graph.node(0).name = original.graph.node(0).name
    model.metadata_props.clear()
    assert fingerprint(original).difference(fingerprint(model)) is None
    for old, new in zip(original.graph.all_nodes(), model.graph.all_nodes(), strict=True):
        assert [v.dtype for v in new.outputs] == [v.dtype for v in old.outputs]
        assert [v.shape for v in new.outputs] == [v.shape for v in old.outputs]
    assert model.opset_imports == original.opset_imports
    assert model.ir_version == original.ir_version


def test_a_changed_weight_arrives_and_the_numbers_follow() -> None:
    config = models.Config()
    model, feed = models.build(config), models.feed(config)
    before = OrtRunner(models.build(config)).run(feed)["logits"]
    report = run(scale_head, model, factor=4.0)
    assert (report.modified, report.applied, report.sites) == (True, 1, ("scale-head",))
    assert report.details == {"change": "initializer 'lm_head.weight' has other numbers"}
    # A power of two scales every rounding alike.
    assert np.array_equal(OrtRunner(model).run(feed)["logits"], 4 * before)


def test_only_weights_that_a_function_looks_at_are_read() -> None:
    model, read = watched(models.build())
    run(scale_head, model)
    assert read == {"lm_head.weight"}


def test_a_model_of_any_size_goes_through_without_being_read() -> None:
    model = models.build()

    def refuse() -> np.ndarray:
        raise AssertionError("a weight of 4 GB was read")

    value = model.graph.initializers["layers.0.up.weight"]
    value.const_value = lazy(value.name, ir.DataType.FLOAT, (32768, 32768), refuse)

    def rename(graph):
        graph.nodes[0].name = "renamed"

    assert run(rename, model).modified
    assert model.graph.initializers["layers.0.up.weight"].const_value.nbytes == 2**32


@pytest.mark.parametrize("shape", [(), (3,), (40, 40)])
@pytest.mark.parametrize("kind", ["BFLOAT16", "FLOAT8E4M3FN", "INT4", "UINT4", "FLOAT16", "INT64"])
def test_weights_of_every_type_survive_being_read(kind: str, shape: tuple[int, ...]) -> None:
    dtype = ir.DataType[kind]
    model = parsed("g (float[N, 8] x) => (float[N, 8] y) { y = Relu (x) }")
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape) % 7
    tensor = ir.Tensor(array.astype(dtype.numpy()), name="w")
    weight = ir.Value(name="w", const_value=tensor, type=ir.TensorType(dtype), shape=tensor.shape)
    model.graph.initializers.add(weight)
    model.graph.append(ir.node("Identity", [weight], name="unused"))
    model.graph.node(-1).outputs[0].name = "unused"

    def read(graph):
        assert graph.nodes[1].inputs[0].values.shape == shape
        graph.nodes[0].name = "renamed"

    assert run(read, model).modified
    assert fingerprint(model).tensors["w"].dtype == dtype
    assert same_tensor(fingerprint(model).tensors["w"], tensor)


def test_folding_of_graphsurgeon_gets_the_numbers() -> None:
    model = parsed("""
        g (float[N, 64] x) => (float[N, 64] y) <float[1] two = {2}> {
            w = Mul (big, two)  y = Add (x, w)
        }""")
    big = np.arange(4096, dtype=np.float32).reshape(64, 64)
    model.graph.initializers.add(
        ir.Value(name="big", const_value=ir.Tensor(big, name="big"), shape=ir.Shape([64, 64]),
                 type=ir.TensorType(ir.DataType.FLOAT))
    )  # fmt: skip
    for node in model.graph:
        node.replace_input_with(
            0, model.graph.initializers["big"]
        ) if node.op_type == "Mul" else None

    def fold(graph):
        return graph.fold_constants().cleanup()

    assert run(fold, model).modified
    assert [node.op_type for node in model.graph] == ["Add"]
    assert np.array_equal(model.graph.initializers["w"].const_value.numpy(), 2 * big)


def test_a_constant_may_be_renamed_and_added() -> None:
    model = models.build()

    def add(graph):
        (head,) = (node for node in graph.nodes if node.outputs[0].name == "logits")
        head.inputs[1].name = "head"
        bias = gs.Constant("bias", np.full(50, 3, np.float32))
        total = gs.Variable("total", dtype=np.float32, shape=head.outputs[0].shape)
        output = head.outputs[0]
        head.outputs = [total]
        graph.nodes.insert(0, gs.Node("Add", "add", inputs=[total, bias], outputs=[output]))

    feed = models.feed(models.Config())
    before = OrtRunner(models.build()).run(feed)["logits"]
    assert run(add, model).modified
    checks.check_graph(model, "model")  # sorted again, although "add" was put first
    assert "lm_head.weight" not in model.graph.initializers
    assert np.array_equal(OrtRunner(model).run(feed)["logits"], before + np.float32(3))


def test_order_of_inputs_and_outputs_is_put_back_and_names_are_told_apart() -> None:
    model = sample("decoder").build()
    names = [[v.name for v in side] for side in (model.graph.inputs, model.graph.outputs)]

    def shuffle(graph):
        graph.inputs.reverse()
        graph.outputs.reverse()
        for node in graph.nodes[:3]:
            node.name = "alike"

    assert run(shuffle, model).modified
    assert [[v.name for v in side] for side in (model.graph.inputs, model.graph.outputs)] == names
    assert [node.name for node in model.graph][:3] == ["alike", "alike_2", "alike_3"]


def test_an_operator_of_another_domain_may_be_added() -> None:
    model = sample("perceptron").build()

    def plugin(graph):
        for node in graph.nodes:
            if node.op == "Relu":
                node.op, node.domain = "FastRelu", "trt.plugins"

    assert run(plugin, model).modified
    assert model.opset_imports["trt.plugins"] == 1


# Options and kinds of functions


def test_parameters_become_options() -> None:
    def fix(graph, *, factor: float = 1.5, name: str = "x", enabled: bool = True, limit=None):
        """Explain me."""

    made = pass_of_function(fix, "function")
    assert made.name == "fix"
    assert (made.__doc__, made.exactness) == ("Explain me.", Exactness.APPROXIMATE)
    options = made.Options(factor=2, limit=3)
    assert (options.factor, options.name, options.enabled, options.limit) == (2.0, "x", True, 3)
    assert not options.exact


def no_parameter() -> None: ...
def takes_model(model: ir.Model) -> None: ...
def takes_ir_graph(graph: ir.Graph) -> None: ...
def needs_more(graph: gs.Graph, factor: float) -> None: ...
def clashes(graph: gs.Graph, exact: bool = True) -> None: ...
def keyword_only(*, graph: gs.Graph) -> None: ...


@pytest.mark.parametrize(("function", "says"), [
    (no_parameter, "takes a gs.Graph"), (takes_model, "optimize passes --template"),
    (takes_ir_graph, "takes a gs.Graph"), (keyword_only, "takes a gs.Graph"),
    (needs_more, "parameter 'factor: 'float'' cannot be an option"),
    (clashes, "a name other than exact and interface"),
])  # fmt: skip
def test_functions_that_cannot_be_steps_are_refused(function: Any, says: str) -> None:
    with pytest.raises(OptionError, match="function: ") as caught:
        pass_of_function(function, "function")
    assert says in str(caught.value)


# What goes wrong


def dangling(graph):
    graph.nodes[-1].inputs[0] = gs.Variable("nowhere", dtype=np.float32)


def unknown_operator(graph):
    graph.nodes[0].op = "NoSuchOperator"


def cyclic(graph):
    first, last = graph.nodes[0], graph.nodes[-1]
    first.inputs[0] = last.outputs[0]


def drops_output(graph):
    graph.outputs.clear()


def raises(graph):
    raise ValueError("no node called 'x'")


def leaves(graph):
    sys.exit("done")


def returns_number(graph):
    return 3


def two_of_one_name(graph):
    graph.nodes[-1].inputs[1].name = graph.nodes[0].outputs[0].name


@pytest.mark.parametrize(("function", "says"), [
    (dangling, ["reads 'nowhere'", "correct dangling in"]),
    (unknown_operator, ["NoSuchOperator", "correct unknown_operator in"]),
    (cyclic, ["cycle"]),
    (drops_output, ["changed the graph outputs", "correct drops_output in"]),
    (raises, ["test_graphsurgeon.py:", "ValueError: no node called 'x'; correct the function"]),
    (leaves, ["SystemExit: done"]),
    (returns_number, ["returned int, expected a gs.Graph or None"]),
    (two_of_one_name, ["correct two_of_one_name in"]),
])  # fmt: skip
def test_a_function_that_fails_or_breaks_the_graph_is_blamed_and_changes_nothing(
    function: Any, says: list[str]
) -> None:
    model = sample("perceptron").build()
    with pytest.raises(ScriptError) as caught:
        run(function, model)
    for part in says:
        assert part in str(caught.value)
    assert caught.value.exit_code == 2
    assert fingerprint(sample("perceptron").build()).difference(fingerprint(model)) is None


def test_a_model_that_graphsurgeon_would_damage_is_refused() -> None:
    model = sample("perceptron").build()
    tensors = ir.Attr("extra", ir.AttributeType.TENSORS, [ir.tensor([1.0])])
    model.graph.node(0).attributes["extra"] = tensors
    with pytest.raises(UnsupportedError, match=r"attribute 'extra' of type TENSORS.* drops"):
        run(nothing, model)


def test_the_interface_may_change_on_request() -> None:
    def drop(graph):
        graph.outputs = graph.outputs[:1]

    model = sample("decoder").build()
    with pytest.raises(ScriptError, match="changed the graph outputs"):
        run(drop, model)
    assert run(drop, model, interface=True).modified
    assert [value.name for value in model.graph.outputs] == ["logits"]


# On the command line

SCRIPT = '''\
import numpy as np
import onnx_graphsurgeon as gs


def fix(graph: gs.Graph, factor: float = 1.001) -> None:
    """Scales the logits."""
    print("fixing", len(graph.nodes), "nodes")
    for node in graph.nodes:
        if node.outputs[0].name == "logits":
            node.inputs[1].values = node.inputs[1].values * np.float32(factor)


def swap(graph):
    for node in graph.nodes:
        if node.op == "Add":
            node.inputs = node.inputs[::-1]
    return graph


def idle(graph):
    return graph.cleanup().toposort()


def fail(graph):
    return graph.nodes["x"]


if __name__ == "__main__":
    import onnx
    onnx.save(gs.export_onnx(gs.import_onnx(onnx.load("model.onnx"))), "out.onnx")
'''


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "fix.py"
    path.write_text(SCRIPT)
    return path


def test_a_function_is_a_step_whose_drift_is_measured(
    command: Callable[..., Outcome], small: Path, script: Path
) -> None:
    found = command(small, "--passes", f"{script}:fix:factor=1.01", "--json")
    assert found.code == 0, found.err
    content = json.loads(found.out)
    row = content["report"]["passes"][1]
    assert (row["pass"], row["exactness"], row["applied"]) == ("fix", "approximate", 1)
    # All logits are multiplied by 1.01, up to rounding in float32.
    assert row["drift"]["relative_l2"] == pytest.approx(0.01, rel=1e-3)
    assert content["recipe"]["passes"][0]["factor"] == 1.01
    assert len(content["recipe"]["passes"][0]["file-sha256"]) == 64
    assert "fixing" in found.err
    load_model(small.with_name("small.opt.onnx"))


def test_exact_is_proven(command: Callable[..., Outcome], small: Path, script: Path) -> None:
    found = command(small, "--passes", f"{script}:swap:exact=true", "--json")
    row = json.loads(found.out)["report"]["passes"][1]
    assert (row["exactness"], row["drift"]) == ("reassociated", None)
    assert row["verification"].startswith("exact: ")
    wrong = command(small, "--passes", f"{script}:fix:exact=true", "--force")
    assert wrong.code == 3
    assert "pass 'fix': output 'logits' is off" in wrong.err


def test_a_function_may_see_the_graph_as_exported(
    command: Callable[..., Outcome], tmp_path: Path
) -> None:
    script = tmp_path / "fix.py"
    script.write_text(
        "def fix(graph):\n"
        "    for node in graph.nodes:\n"
        "        if node.op == 'Identity' and node.name != 'seen':\n"
        "            node.name = 'seen'\n"
    )
    save_model(sample("loose-ends").build(), tmp_path / "m.onnx")
    words = (tmp_path / "m.onnx", "--verify", "off", "--dry-run", "--json", "--passes")
    raw = json.loads(command(*words, f"{script}:fix,canonicalize").out)["report"]["passes"]
    assert [(row["pass"], row["modified"]) for row in raw] == [
        ("fix", True),
        ("canonicalize", True),
    ]
    after = json.loads(command(*words, f"{script}:fix").out)["report"]["passes"]
    assert [row["pass"] for row in after] == ["canonicalize", "fix"]
    assert "changed nothing" in after[1]["skipped"][0]["reason"]


def test_bisect_names_the_function_that_breaks_a_model(
    command: Callable[..., Outcome], small: Path, script: Path
) -> None:
    passes = f"{script}:idle,{script}:fix:factor=1.5,{script}:swap"
    found = command("bisect", small, "--passes", passes, "--budget", "relative_l2<=0.1", "--json")
    content = json.loads(found.out)
    assert (found.code, content["status"], content["pass"]) == (0, "rewrite", "fix")


def test_a_failure_names_the_line_of_the_script_and_ends_with_2(
    command: Callable[..., Outcome], small: Path, script: Path
) -> None:
    found = command(small, "--passes", f"{script}:fail")
    assert found.code == 2
    line = 1 + SCRIPT.splitlines().index('    return graph.nodes["x"]')
    assert f"pass 'fail': {script}:{line}: TypeError: " in found.err
    assert not small.with_name("small.opt.onnx").exists()


WHOLE = """\
import onnx
import onnx_graphsurgeon as gs

graph = gs.import_onnx(onnx.load("model.onnx"))
onnx.save(gs.export_onnx(graph), "out.onnx")

def fix(graph): ...
"""


@pytest.mark.parametrize("name", ["fix.py:fix", "fix.py"])
def test_a_script_that_loads_and_saves_by_itself_is_not_run(
    command: Callable[..., Outcome], small: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "fix.py").write_text(WHOLE)
    found = command(small, "--passes", f"{tmp_path}/{name}")
    assert found.code == 2
    if name == "fix.py":
        assert "which part of the file?" in found.err
    else:
        assert f"{tmp_path}/fix.py:4 calls gs.import_onnx as soon as the file is read" in found.err
        assert "`def fix(graph): ...`" in found.err


def test_what_a_function_cannot_be_is_explained_by_the_passes_command(
    command: Callable[..., Outcome], script: Path
) -> None:
    found = command("passes", f"{script}:fix")
    assert found.code == 0
    assert "Scales the logits." in found.out
    assert "factor = 1.001" in found.out
    assert "exact = False" in found.out
