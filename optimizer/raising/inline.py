"""Functions of the model are replaced by their bodies.

Rewrite:      y = f(x), f defined in the model -> the body of f
Applies when: f is written for the version of the standard operators that the model imports
Exactness:    bitwise
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from optimizer.graph import forget_names
from optimizer.raising.base import Miss, RuleReport, allow, opset_of


def run(model: ir.Model) -> RuleReport:
    """Inline every function and forget the definitions."""
    imports = {"": opset_of(model), **model.opset_imports}
    misses = tuple(
        Miss(name, f"the function is written for {_named(domain)} {own}, the model for {version}")
        for (_, name, _), function in model.functions.items()
        for domain, own in function.opset_imports.items()
        if (version := imports.get(domain, own)) != own
    )
    if misses or not model.functions or not allow("functions"):
        return RuleReport(0, misses)
    count = len(model.functions)
    InlinePass()(model)
    model.functions.clear()
    forget_names(model.graph)
    used = {node.domain for node in model.graph.all_nodes()} | {""}
    for domain in [domain for domain in model.graph.opset_imports if domain not in used]:
        del model.graph.opset_imports[domain]
    return RuleReport(count)


def _named(domain: str) -> str:
    return f"version of domain '{domain}'" if domain else "opset"
