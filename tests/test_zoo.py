"""Every family of the zoo is raised to its blocks, and still computes the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import zoo

from optimizer.blocks import Block, find_blocks
from optimizer.pass_base import Context
from optimizer.runners.ort import OrtRunner
from optimizer.runners.reference import ReferenceRunner
from optimizer.structure import Structure
from passes.canonicalize import Canonicalize

QUICK = [cell.id for cell in zoo.cells(full=False)]
CELLS = [
    pytest.param(cell, id=cell.id, marks=() if cell.id in QUICK else pytest.mark.slow)
    for cell in zoo.cells(full=True)
]
SIZES = ({"batch": 3, "sequence": 6, "past": 4}, {"batch": 1, "sequence": 1, "past": 9})
ASSETS = Path(__file__).parents[1] / "../shared/assets"
ACTIVATIONS = {
    "clip-text": "quick-gelu",
    "clip-vision": "quick-gelu",
    "gpt2": "gelu-tanh",
    "opt": "relu",
    "phi": "gelu-tanh",
}


def raised(model: ir.Model) -> ir.Model:
    """A canonical copy."""
    copy = model.clone()
    Canonicalize().call(copy, Context())
    return copy


def assert_same_outputs(
    original: ir.Model, candidate: ir.Model, feeds: list[dict[str, np.ndarray]]
) -> None:
    """The bound on reassociated sums: twice the original's own error, or 16 roundings.

    Both are judged against the original computed in float64.
    """
    exact = ReferenceRunner(original, double=True)
    before, after = OrtRunner(original), OrtRunner(candidate)
    for feed in feeds:
        truth, old, new = exact.run(feed), before.run(feed), after.run(feed)
        assert list(new) == list(old)
        for name, value in truth.items():
            size = np.abs(value).max(initial=0)
            own = np.abs(old[name] - value).max(initial=0)
            bound = max(2 * own, 16 * np.finfo(np.float32).eps * size)
            assert np.abs(new[name] - value).max(initial=0) <= bound, name


def assert_no_leftovers(model: ir.Model, layers: int) -> None:
    """Each layer's attention is one node, without layout changes, and tables are shared."""
    count = Counter(node.op_type for node in model.graph)
    assert count["Attention"] == layers
    assert not count["Softmax"]
    assert not count["IsNaN"]
    assert not count["Split"]
    assert count["Transpose"] <= 1  # the one after the patches of a vision model
    assert max(count["Cos"], count["Sin"]) <= 1


def assert_layers(structure: Structure, expected: zoo.Blocks, activation: str) -> None:
    assert not structure.misses
    assert len(structure.blocks) == expected.layers
    for index, block in enumerate(structure.blocks):
        assert not block.extras
        assert block.index == index
        assert summary(block) == {
            "style": expected.style,
            "norm": expected.norm,
            "heads": (expected.heads, expected.kv_heads, expected.head_dim),
            "scale": pytest.approx(expected.head_dim**-0.5, rel=1e-6),
            "hidden": expected.hidden,
            "ffn": expected.ffn,
            "gated": expected.gated,
            "activation": activation,
        }
    for before, after in zip(structure.blocks, structure.blocks[1:], strict=False):
        assert after.input is before.output


def summary(block: Block) -> dict[str, object]:
    attention, mlp = block.attention, block.mlp
    assert attention.softcap == 0
    return {
        "style": block.style.value,
        "norm": block.attention_norm.kind.value,
        "heads": (attention.heads, attention.kv_heads, attention.head_dim),
        "scale": attention.scale,
        "hidden": block.hidden_size,
        "ffn": int(mlp.down.weight.shape[0]),
        "gated": mlp.gate is not None,
        "activation": mlp.activation,
    }


@pytest.mark.parametrize("cell", CELLS)
def test_family_is_raised_to_its_blocks_and_computes_the_same(cell: zoo.Cell) -> None:
    original = ir.load(zoo.export(cell.entry, cell.opset, cell.kv_cache))
    model = raised(original)

    expected = cell.entry.blocks
    assert_no_leftovers(model, expected.layers)
    structure = find_blocks(model)
    usual = "silu" if expected.gated else "gelu"
    assert_layers(structure, expected, ACTIVATIONS.get(cell.entry.name, usual))
    rotary = {"llama", "mistral", "mistral-sliding", "qwen2", "gpt-neox", "phi"}
    for layer, block in enumerate(structure.blocks):
        attention = block.attention
        assert (attention.q_rotary is not None) == (cell.entry.name in rotary)
        assert (attention.k_rotary is not None) == (cell.entry.name in rotary)
        past = attention.past_key, attention.past_value
        present = attention.present_key, attention.present_value
        if cell.kv_cache:
            names = [f"{layer}.key", f"{layer}.value"]
            assert [v.name for v in past if v] == [f"past_key_values.{n}" for n in names]
            assert [v.name for v in present if v] == [f"present.{n}" for n in names]
        else:
            assert past == present == (None, None)

    feeds = [
        zoo.make_feeds(cell.entry, cell.kv_cache, seed=seed, **sizes)
        for seed, sizes in enumerate(SIZES)
    ]
    assert_same_outputs(original, model, feeds)


@pytest.mark.parametrize("entry", ["llama", "gpt-neox"])
def test_raising_again_changes_nothing(entry: str) -> None:
    cell = zoo.Cell(zoo.ZOO[entry], 18, True)
    once = raised(ir.load(zoo.export(cell.entry, cell.opset, cell.kv_cache)))
    twice = raised(once)
    assert [str(n) for n in twice.graph] == [str(n) for n in once.graph]


def test_padding_on_the_left_leaves_the_logits_of_tokens_as_they_are() -> None:
    """Queries without any key exist then; what they compute differs, and nobody reads it."""
    cell = zoo.Cell(zoo.ZOO["llama"], 18, False)
    original = ir.load(zoo.export(cell.entry, cell.opset, cell.kv_cache))
    feed = zoo.make_feeds(cell.entry, False, batch=2, sequence=6)
    feed["attention_mask"][:] = 1
    feed["attention_mask"][0, :3] = 0
    exact = ReferenceRunner(original, double=True).run(feed)["logits"]
    before, after = (OrtRunner(m).run(feed)["logits"] for m in (original, raised(original)))
    assert np.isfinite(after).all()
    tokens = feed["attention_mask"].astype(bool)
    exact, before, after = exact[tokens], before[tokens], after[tokens]
    bound = max(2 * np.abs(before - exact).max(), 16 * np.finfo(np.float32).eps * abs(exact).max())
    assert np.abs(after - exact).max() <= bound


def asset(path: str) -> Path | None:
    """A file of the shared assets, where they are."""
    file = ASSETS / path
    return file if file.is_file() and file.stat().st_size > 1000 else None


def test_llama_of_a_released_export_has_its_five_layers() -> None:
    file = asset("llama/stories260K.onnx")
    if file is None:
        cell = zoo.Cell(zoo.ZOO["llama"], 18, False)
        file, layers = Path(zoo.export(cell.entry, cell.opset, cell.kv_cache)), 2
        feeds = [zoo.make_feeds(cell.entry, False, batch=2, sequence=7)]
    else:
        layers = 5
        feeds = [{"input_ids": np.random.default_rng(0).integers(3, 500, (2, 7))}]
    original = ir.load(file)
    model = raised(original)
    structure = find_blocks(model)
    assert len(structure.blocks) == layers
    assert not structure.misses
    assert_same_outputs(original, model, feeds)


def test_attention_whose_probabilities_are_an_output_is_still_a_block() -> None:
    file = asset("vit/vit-canvas/microvit_run_3.onnx")
    rng = np.random.default_rng(0)
    if file is None:
        cell = zoo.Cell(zoo.ZOO["vit"], 18, False)
        file = Path(zoo.export(cell.entry, cell.opset, cell.kv_cache))
        feeds, extras = [zoo.make_feeds(cell.entry, False)], ()
    else:
        feeds, extras = (
            [{"input": rng.random((1, 1, 28, 28), np.float32)}],
            ("attention scores are read",),
        )
    original = ir.load(file)
    model = raised(original)
    blocks = find_blocks(model).blocks
    assert [block.extras for block in blocks] == [extras, extras]
    assert_same_outputs(original, model, feeds)


def test_attention_as_tensorflow_writes_it_is_raised() -> None:
    file = asset("vit/cct_xs_lpr/cct_xs_v1_global.onnx")
    if file is None:
        cell = zoo.Cell(zoo.ZOO["deit"], 18, False)
        original = ir.load(zoo.export(cell.entry, cell.opset, cell.kv_cache))
        feeds, attentions = [zoo.make_feeds(cell.entry, False)], 2
    else:
        original = ir.load(file)
        images = np.random.default_rng(0).integers(0, 255, (2, 64, 128, 3))
        feeds, attentions = [{"input": images.astype(np.uint8)}], 4
    model = raised(original)
    assert sum(node.op_type == "Attention" for node in model.graph) == attentions
    before, after = (OrtRunner(m).run(feeds[0]) for m in (original, model))
    for name, value in before.items():  # the same sums, in ONNX Runtime in the same order
        bound = 16 * np.finfo(np.float32).eps * np.abs(value).max()
        assert np.abs(after[name] - value).max() <= bound
