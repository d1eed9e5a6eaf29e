"""Symbolic batch, sequence and past survive every pass; where inference fails, nothing breaks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Outcome, token_samples
from rule_case import graph, ops

from optimizer.api import optimize
from optimizer.pass_base import Context, Exactness
from optimizer.runners.ort import OrtRunner
from passes import PASS_NAMES, get_pass
from passes.canonicalize import Canonicalize

#: What a pass is asked for, where its defaults would search or leave small models alone.
OPTIONS = {
    "cqil": ":group=2;first=1;last=2",
    "fuse-concurrent": ":pack=always",
    "sparse-matmul": ":force=true",
}
#: Passes that need a fixed number of tokens; their own tests run them with a symbolic batch.
FIXED_TOKENS = {"tome", "crossget", "prune-tokens"}
#: Which lengths are fixed; the others are names.
FIXED: dict[str, dict[str, int]] = {
    "batch": {"sequence": 6},
    "sequence": {"batch": 2},
    "batch and sequence": {},
    "past": {},
    "past of a single row": {"batch": 1},
}
#: Batch, sequence, past: one token, ordinary, and other lengths than before.
SIZES = [(1, 1, 0), (2, 5, 3), (3, 6, 1)]


def build(symbolic: str) -> tuple[models.Config, ir.Model]:
    config = models.Config(layers=4, kv_cache=symbolic.startswith("past"))
    model = models.build(config)
    for value in (*model.graph.inputs, *model.graph.outputs):
        dims = [d if isinstance(d, int) else d.value for d in value.shape]
        known = FIXED[symbolic] | (
            {} if config.kv_cache else {"total_sequence": FIXED[symbolic].get("sequence")}
        )
        value.shape = ir.Shape([known.get(d) or d for d in dims])
    return config, model


def names_of_axes(model: ir.Model) -> dict[str, list[str | None]]:
    return {
        value.name: [None if isinstance(d, int) else d.value for d in value.shape]
        for value in (*model.graph.inputs, *model.graph.outputs)
    }


@pytest.mark.parametrize("symbolic", FIXED)
@pytest.mark.parametrize("name", [n for n in PASS_NAMES if n not in FIXED_TOKENS])
def test_a_pass_keeps_symbolic_lengths_and_the_result_runs_at_all(name: str, symbolic: str) -> None:
    config, model = build(symbolic)
    axes, before = names_of_axes(model), OrtRunner(model)
    lengths = FIXED[symbolic]
    made = optimize(
        model,
        [] if name == "canonicalize" else name + OPTIONS.get(name, ""),
        calibration=token_samples(count=4, length=lengths.get("sequence", 9)),
        verify="off",
    )
    result, after = made.model, names_of_axes(made.model)
    assert name == "canonicalize" or made.report.rows[1].applied > 0
    assert {key: after[key] for key in axes if key in after} == {
        key: axes[key] for key in axes if key in after
    }
    assert {"input_ids", "logits"} <= set(after)
    runner = OrtRunner(result)
    exact = get_pass(name).exactness is not Exactness.APPROXIMATE
    for rows, tokens, past in SIZES:
        batch, sequence = lengths.get("batch", rows), lengths.get("sequence", tokens)
        feed = models.feed(config, batch, sequence, past)
        merged = {n: _fitting(n, feed, runner) for n in runner.input_names}
        logits = runner.run(merged)["logits"]
        assert logits.shape == (batch, sequence, config.vocab)
        assert np.isfinite(logits).all()
        if exact:
            wanted = before.run(feed)["logits"]
            # The bound of exact passes is 16 roundings; four layers of sums take some more.
            assert np.abs(logits - wanted).max() <= 100 * 2.0**-23 * np.abs(wanted).max()


def _fitting(name: str, feed: dict[str, np.ndarray], runner: OrtRunner) -> np.ndarray:
    """An input; the cache of a group holds those of its members."""
    spec = next(spec for spec in runner.inputs if spec.name == name)
    array = feed[name]
    heads = spec.shape[1] if array.ndim == 4 else None
    return array if heads is None else np.concatenate([array] * (heads // array.shape[1]), axis=1)


class Notes:
    """A listener that keeps its notes."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def stage(self, title: str) -> None:
        """Ignore."""

    def progress(self, done: int, total: int) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Keep."""
        self.texts.append(text)


def unfit() -> ir.Model:
    """x and z do not fit each other; beside them stands a sound layer that can be raised."""
    return graph(
        "[product] a = MatMul(x, z)  b = Tanh(a)  s = Sigmoid(h)  g = Mul(h, s)"
        "  f = Add(h, none)  y = Add(f, g)",
        inputs="float[4,3] x, float[2,3] z, float[B,4] h",
        output="float[M,N] b, float[B,4] y",
        constants="float none = {0}",
    )


def test_where_inference_fails_the_node_is_named_and_the_rest_is_rewritten() -> None:
    model, notes = unfit(), Notes()
    report = Canonicalize().call(model, Context(listener=notes))
    assert notes.texts == [
        "canonicalize: product: shape inference fails at this MatMul: Incompatible dimensions for "
        "matrix multiplication; what needs the types of its results is left alone"
    ]
    assert report.skipped[0].site == "product"
    assert ops(model)["MatMul"] == 1
    assert ops(model)["Add"] == 1  # + 0 went away


def test_the_command_warns_and_goes_on(tmp_path: Path, command: Callable[..., Outcome]) -> None:
    onnx.save(ir.to_proto(unfit()), tmp_path / "m.onnx")
    found = command(tmp_path / "m.onnx", "--verify", "off")
    assert found.code == 0
    assert found.lines[0].startswith("canonicalize: product: shape inference fails")
    assert "Traceback" not in found.err


def test_inference_that_fails_altogether_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no schema for anything\nand more")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", fail)
    model, notes = models.build(layers=1), Notes()
    Canonicalize().call(model, Context(listener=notes))
    (text,) = notes.texts
    assert "main_graph: shape inference fails: no schema for anything and more" in text
