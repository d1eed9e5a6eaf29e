"""TensorRT for RTX builds engines of reduced models, without a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import causal_models
import onnx
import onnx_ir as ir
import pytest
from fusion_models import Fusion, build_fusion

from optimizer.conformance.encoders import Encoder, build_encoder
from optimizer.legalize import legalize
from optimizer.pass_base import Context
from passes import get_pass
from passes.canonicalize import Canonicalize
from passes.crossget import CrossGet, Options

#: In a process of its own, since TensorRT aborts on some mistakes.
BUILD = """
import pathlib, sys
import tensorrt_rtx as trt

logger = trt.Logger(trt.Logger.ERROR)
for model in sys.argv[1:]:
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(pathlib.Path(model).read_bytes()):
        print(model, "not parsed:", parser.get_error(0).desc())
        continue
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        sizes = [tuple([batch, *tensor.shape[1:]]) for batch in (1, 2, 4)]
        profile.set_shape(tensor.name, *sizes)
    config.add_optimization_profile(profile)
    made = builder.build_serialized_network(network, config)
    print(model, "no engine" if made is None else "engine")
"""


def images_and_text() -> dict[str, ir.Model]:
    """Text of a fixed length that reads image tokens, and a causal text."""
    made = {"crossed": build_fusion(Fusion("crossed")), "joined": build_fusion(Fusion("joined"))}
    for model in made.values():
        text = next(value for value in model.graph.inputs if value.name == "text")
        text.shape = ir.Shape(["batch", 4, text.shape[2]])
    return made | {"causal": causal_models.build()}


@pytest.mark.tensorrt
def test_every_way_to_reduce_tokens_builds(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT for RTX is not installed: pip install tensorrt-rtx")
    names = []
    for name in ("tome", "crossget", "prune-tokens"):
        for head, mask in (("class", None), ("hidden", "padding")):
            model = build_encoder(Encoder(head=head, mask=mask))
            Canonicalize().call(model, Context())
            pass_class = get_pass(name)
            reduce = pass_class(pass_class.Options(r=2, places=True))
            assert reduce.call(model, Context(target="tensorrt-rtx")).applied == 3
            legalize(model, "tensorrt-rtx")
            names.append(f"{name}-{head}.onnx")
            onnx.save(ir.to_proto(model), tmp_path / names[-1])
    for case, model in images_and_text().items():
        Canonicalize().call(model, Context())
        report = CrossGet(Options(r=2)).call(model, Context(target="tensorrt-rtx"))
        assert (report.applied, report.notes) == (3, ())
        legalize(model, "tensorrt-10")
        names.append(f"{case}.onnx")
        onnx.save(ir.to_proto(model), tmp_path / names[-1])
    run = subprocess.run(
        [sys.executable, "-c", BUILD, *names], capture_output=True, text=True, check=False,
        cwd=tmp_path,
    )  # fmt: skip
    assert run.stdout.split("\n")[:-1] == [f"{name} engine" for name in names], run.stderr


@pytest.mark.parametrize("name", ["tome", "crossget", "prune-tokens"])
def test_no_operator_is_used_that_its_parser_refuses(name: str) -> None:
    """It takes no scatter that reduces, and tokens are not moved by sorting either."""
    model = build_encoder(Encoder(head="hidden"))
    pass_class = get_pass(name)
    pass_class(pass_class.Options(r=2)).call(model, Context(target="tensorrt-rtx"))
    operators = {node.op_type for node in model.graph}
    assert not operators & {"ScatterElements", "ScatterND", "NonZero", "Unique"}
