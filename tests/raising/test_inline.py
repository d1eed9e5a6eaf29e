from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from optimizer.raising import inline

TEXT = """<ir_version: 10, opset_import: ["" : 23, "local" : 1]>
g (float[B,4] x) => (float[B,4] y) { a = local.twice (x)  y = local.twice (a) }
<domain: "local", opset_import: ["" : %d]>
twice (v) => (w) { t = Constant<value_float = 2.0>()  w = Mul(v, t) }
"""


def test_functions_are_replaced_by_their_bodies():
    proto = onnx.parser.parse_model(TEXT % 23)
    case = ir.from_proto(proto)
    assert inline.run(case).applied == 1
    assert not case.functions
    assert {node.domain for node in case.graph} == {""}
    assert "local" not in case.graph.opset_imports
    x = np.ones((2, 4), np.float32)
    (y,) = ReferenceEvaluator(ir.to_proto(case)).run(None, {"x": x})
    np.testing.assert_array_equal(y, 4 * x)


def test_a_function_of_another_opset_stays_and_says_why():
    case = ir.from_proto(onnx.parser.parse_model(TEXT % 12))
    report = inline.run(case)
    assert report.applied == 0
    assert "opset 12" in report.skipped[0].reason
    assert len(case.functions) == 1


def test_a_function_for_another_version_of_its_own_domain_stays_too():
    text = (TEXT % 23).replace('opset_import: ["" : 23]', 'opset_import: ["" : 23, "local" : 2]')
    case = ir.from_proto(onnx.parser.parse_model(text))
    assert "version of domain 'local' 2" in inline.run(case).skipped[0].reason
