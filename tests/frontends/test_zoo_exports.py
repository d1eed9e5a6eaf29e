"""Every export of the zoo equals torch, at sizes other than those it was traced with."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import zoo

QUICK = [cell.id for cell in zoo.cells(full=False)]
CELLS = [
    pytest.param(cell, id=cell.id, marks=() if cell.id in QUICK else pytest.mark.slow)
    for cell in zoo.cells(full=True)
]
SIZES = (
    {"batch": 3, "sequence": 6, "past": 4},
    {"batch": 1, "sequence": 1, "past": 9},
    {"batch": 4, "sequence": 8, "past": 0},
    {"batch": 1, "sequence": 1, "past": 0},
)
# Both sides compute in float32 with sums of at most 133 terms through two layers; measured errors
# are below 2e-6 of the largest output. A wrong mask, position or weight is off by 1e-2 and more.
TOLERANCE = 1e-5


@pytest.mark.parametrize("cell", CELLS)
def test_export_equals_torch_at_other_sizes(cell: zoo.Cell) -> None:
    path = zoo.export(cell.entry, cell.opset, cell.kv_cache)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    model = zoo.make_model(cell.entry)
    for seed, sizes in enumerate(SIZES):
        feeds = zoo.make_feeds(cell.entry, cell.kv_cache, seed=seed, **sizes)
        expected = zoo.torch_outputs(cell.entry, cell.kv_cache, feeds, model)
        found = dict(zip(names, session.run(None, feeds), strict=True))
        assert sorted(found) == sorted(expected)
        for name in names:
            scale = np.abs(expected[name]).max()
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=TOLERANCE * scale)


def test_quick_selection_has_every_family_opset_and_cache_state() -> None:
    quick = zoo.cells(full=False)
    assert {cell.entry.name for cell in quick} == set(zoo.ZOO)
    for entry in zoo.ZOO.values():
        if entry.kind == "decoder":
            mine = [cell for cell in quick if cell.entry is entry]
            assert {cell.opset for cell in mine} == {18, 23}
            assert {cell.kv_cache for cell in mine} == {False, True}
    assert {cell.opset for cell in quick if cell.entry.kind != "decoder"} == {18, 23}


def test_random_weights_make_every_norm_and_bias_visible() -> None:
    for entry in zoo.ZOO.values():
        for name, parameter in zoo.make_model(entry).named_parameters():
            values = parameter.detach().numpy()
            assert values.std() > 0.01, f"{entry.name} {name}"
