from __future__ import annotations

import exporters
import families
import numpy as np
import pytest

from optimizer.legalize import legalize
from optimizer.model_io import load_model
from optimizer.pass_base import Context
from optimizer.runners.decode import DecodeSession
from passes.canonicalize import Canonicalize

ENTRIES = ["llama", "mistral-sliding", "gpt2", "gpt-neox", "opt", "qwen3", "gemma", "phi"]
CELLS = [
    exporters.Cell(families.FAMILIES[name], f"dynamo-{(18, 23)[index % 2]}", kv_cache=True)
    for index, name in enumerate(ENTRIES)
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.id)
def test_every_decoder_family_fills_its_cache_in_place(cell):
    path = exporters.export(cell)
    model = load_model(path)
    Canonicalize().call(model, Context())
    legalize(model, "ort-cpu", kv_cache="in-place")
    original, in_place = DecodeSession(path), DecodeSession(model, max_length=32)
    rng = np.random.default_rng(0)
    ids, tokens = rng.integers(3, 90, (2, 9)), rng.integers(3, 90, (4, 2))
    mask = np.ones_like(ids)
    if "sliding" not in cell.entry.name:  # there, padding would use up the original's window
        mask[0, 6:] = 0
    before, after = original.prefill(ids, mask), in_place.prefill(ids, mask)
    assert _close(before[mask.astype(bool)], after[mask.astype(bool)])
    for token in tokens:
        assert _close(original.step(token), in_place.step(token))


def _close(one: np.ndarray, two: np.ndarray) -> bool:
    return bool(np.abs(one - two).max() <= 1e-5 * np.abs(one).max())
