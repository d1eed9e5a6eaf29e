"""Every family of the zoo is raised to its blocks, and still computes the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import exporters
import families
import numpy as np
import onnx_ir as ir
import pytest
from exporters import Cell, export
from judge import Outcome, judge

from optimizer.blocks import find_blocks
from optimizer.pass_base import Context
from optimizer.runners.ort import OrtRunner
from optimizer.runners.reference import ReferenceRunner
from passes.canonicalize import Canonicalize

ASSETS = Path(__file__).parents[1] / "../shared/assets"
DIAGONAL = [cell for cell in exporters.diagonal() if cell.id not in exporters.BEYOND]


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


@pytest.mark.parametrize("cell", DIAGONAL, ids=lambda cell: cell.id)
def test_family_is_raised_to_its_blocks_and_computes_the_same(cell: Cell) -> None:
    refused = cell.entry.blocks.refused is not None
    verdict = judge(cell)
    assert verdict.outcome is (Outcome.REFUSED if refused else Outcome.RIGHT), verdict.detail


@pytest.mark.parametrize("name", sorted(exporters.BEYOND))
def test_what_cannot_be_made_still_cannot(name: str) -> None:
    """Once it can, it belongs into the diagonal."""
    (cell,) = [cell for cell in exporters.diagonal() if cell.id == name]
    assert judge(cell).outcome is Outcome.NOT_EXPORTED


CLEAN = ["llama", "mistral", "qwen3", "opt", "gpt2", "phi", "bert", "vit", "bart-encoder"]


@pytest.mark.parametrize("name", CLEAN)
def test_each_layer_has_one_attention_and_tables_are_shared(name: str) -> None:
    entry = families.FAMILIES[name]
    model = raised(ir.load(export(Cell(entry, "dynamo-18", entry.cached))))
    count = Counter(node.op_type for node in model.graph)
    assert count["Attention"] == entry.blocks.layers
    assert not count["Softmax"]
    assert not count["IsNaN"]
    assert not count["Split"]
    assert count["Transpose"] <= 1  # the one after the patches of a vision model
    assert max(count["Cos"], count["Sin"]) <= 1


@pytest.mark.parametrize("name", ["llama", "qwen3", "bart-decoder"])
def test_the_cache_belongs_to_its_layer(name: str) -> None:
    entry = families.FAMILIES[name]
    part = "decoder." if entry.kind == "seq2seq" else ""
    structure = find_blocks(raised(ir.load(export(Cell(entry, "dynamo-23", True)))))
    for layer, block in enumerate(structure.blocks):
        attention = block.attention
        past = attention.past_key, attention.past_value
        present = attention.present_key, attention.present_value
        names = [f"{layer}.{part}{side}" for side in ("key", "value")]
        assert [v.name for v in past if v] == [f"past_key_values.{n}" for n in names]
        assert [v.name for v in present if v] == [f"present.{n}" for n in names]


@pytest.mark.parametrize("entry", ["llama", "gpt-neox"])
def test_raising_again_changes_nothing(entry: str) -> None:
    cell = Cell(families.FAMILIES[entry], "dynamo-18", True)
    once = raised(ir.load(export(cell)))
    twice = raised(once)
    assert [str(n) for n in twice.graph] == [str(n) for n in once.graph]


def test_padding_on_the_left_leaves_the_logits_of_tokens_as_they_are() -> None:
    """Queries without any key exist then; what they compute differs, and nobody reads it."""
    cell = Cell(families.FAMILIES["llama"], "dynamo-18", False)
    original = ir.load(export(cell))
    feed = families.make_feeds(cell.entry, False, batch=2, sequence=6)
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
        cell = Cell(families.FAMILIES["llama"], "dynamo-18", False)
        file, layers = export(cell), 2
        feeds = [families.make_feeds(cell.entry, False, batch=2, sequence=7)]
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
        cell = Cell(families.FAMILIES["vit"], "dynamo-18", False)
        file = export(cell)
        feeds, extras = [families.make_feeds(cell.entry, False)], ()
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
        cell = Cell(families.FAMILIES["deit"], "dynamo-18", False)
        original = ir.load(export(cell))
        feeds, attentions = [families.make_feeds(cell.entry, False)], 2
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
