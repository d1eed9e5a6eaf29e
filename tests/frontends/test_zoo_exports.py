"""Exports by the frontend equal torch, at sizes other than those they were traced with."""

from __future__ import annotations

import exporters
import families
import numpy as np
import onnxruntime as ort
import pytest

#: MPT with a cache is beyond torch's exporter; ALiBi of Falcon is computed in bfloat16, for which
#: ONNX Runtime has no kernels.
BEYOND = {"mpt-dynamo-18-kv", "mpt-dynamo-23-kv"}
CELLS = [
    cell
    for cell in exporters.frontend_cells()
    if cell.id not in BEYOND and cell.entry.name != "falcon-alibi"
]
SIZES = (
    {"batch": 3, "sequence": 6, "past": 4},
    {"batch": 1, "sequence": 1, "past": 9},
    {"batch": 4, "sequence": 8, "past": 0},
    {"batch": 1, "sequence": 1, "past": 0},
)
# Both sides compute in float32 with sums of at most 256 terms through two layers; measured errors
# are below 2e-6 of the largest output. A wrong mask, position or weight is off by 1e-2 and more.
TOLERANCE = 1e-5


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.id)
def test_export_equals_torch_at_other_sizes(cell: exporters.Cell) -> None:
    path = exporters.export(cell)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    model = families.make_model(cell.entry)
    for seed, sizes in enumerate(SIZES):
        feeds = families.make_feeds(cell.entry, cell.kv_cache, seed=seed, **sizes)
        feeds = {name: array for name, array in feeds.items() if name in wanted}
        expected = families.torch_outputs(cell.entry, cell.kv_cache, feeds, model)
        found = dict(zip(names, session.run(None, feeds), strict=True))
        assert sorted(found) == sorted(expected)
        for name in names:
            scale = np.abs(expected[name]).max()
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=TOLERANCE * scale)


def test_selection_has_every_family_opset_and_cache_state() -> None:
    kinds = ("decoder", "text", "vision")
    for entry in families.FAMILIES.values():
        mine = [cell for cell in exporters.frontend_cells() if cell.entry is entry]
        assert bool(mine) == (entry.kind in kinds)
        if entry.kind == "decoder":
            assert {cell.way for cell in mine} == {"dynamo-18", "dynamo-23"}
            assert {cell.kv_cache for cell in mine} == {False, True}


def test_random_weights_make_every_norm_and_bias_visible() -> None:
    for entry in families.FAMILIES.values():
        for name, parameter in families.make_model(entry).named_parameters():
            values = parameter.detach().numpy()
            assert values.std() > 0.01, f"{entry.name} {name}"
