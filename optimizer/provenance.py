"""What a written model says about its own making."""

from __future__ import annotations

import json

import onnx_ir as ir

from optimizer import __version__
from optimizer.recipe import Recipe

#: Settings of the recipe that are written into the model.
_STAMPED = (
    *("version", "passes", "target", "kv_cache", "opset", "samples", "batch"),
    *("calibration_sha256", "evaluation_sha256"),
)
#: Metadata that the exporters of torch leave: stack traces, graph signatures, module paths.
_TRACING = ("pkg.torch.", "namespace")


def stamp(model: ir.Model, recipe: Recipe) -> None:
    """Leave in the model what made it, and nothing of the machine or of the exporter's tracing.

    Only settings that change the result are kept, so that the bytes depend on nothing else.
    """
    content = recipe.as_dict()
    for step, written in zip(recipe.steps, content["passes"], strict=True):
        written["pass"] = step.name  # without the path of a pass that came from a file
    kept = {key: content[key] for key in _STAMPED if content[key] is not None}
    _drop_tracing(model)
    model.producer_name = "optimize-onnx"
    model.producer_version = __version__
    model.metadata_props["optimize.recipe"] = json.dumps(kept, sort_keys=True)


def _drop_tracing(model: ir.Model) -> None:
    """Remove the exporter's notes: of nodes that are gone, and with paths of its host."""
    notes: list[dict[str, str]] = [model.metadata_props, model.graph.metadata_props]
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        notes.append(node.metadata_props)
        values += node.outputs
    notes += [value.metadata_props for value in values]
    for properties in notes:
        for key in [name for name in properties if name.startswith(_TRACING)]:
            del properties[key]
