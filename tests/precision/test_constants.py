"""What becomes of stored numbers: counted, judged, converted when they are read."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from optimizer.graph import lazy
from optimizer.precision import constants
from optimizer.precision.limits import BF16, FP16


def look(numbers: object, format_=FP16) -> constants.Numbers:
    return constants.look(ir.tensor(np.asarray(numbers, np.float32)), format_)


def test_numbers_are_counted_by_what_becomes_of_them():
    found = look([1e5, -2, 0, 3e-8, 2e-8, 1e-5, 0.5, np.inf])
    assert found.count == 8
    assert (found.lowest, found.highest) == (-2, np.float32(1e5))
    assert found.overflowing == 1  # infinity is infinity in any type
    assert found.vanishing == 1  # 2e-8 is below half of 6e-8, 3e-8 above
    assert found.shortened == 2  # 3e-8 and 1e-5


@pytest.mark.parametrize("format_", [FP16, BF16], ids=["fp16", "bf16"])
def test_the_last_number_that_fits_is_half_a_step_beyond_the_largest(format_):
    edge = np.float32(format_.end)
    with np.errstate(over="ignore"):
        assert np.isinf(edge.astype(format_.dtype.numpy()))
        assert np.isfinite(np.nextafter(edge, np.float32(0)).astype(format_.dtype.numpy()))
    assert look([edge], format_).overflowing == 1
    assert look([np.nextafter(edge, np.float32(0))], format_).overflowing == 0


def test_numbers_are_read_piece_by_piece(monkeypatch):
    rng = np.random.default_rng(0)
    array = (rng.normal(size=1000) * 10.0 ** rng.integers(-9, 6, 1000)).astype(np.float32)
    whole = look(array)
    monkeypatch.setattr(constants, "_PIECE", 7)
    pieces = look(array)
    assert (pieces.overflowing, pieces.vanishing, pieces.shortened) == (
        whole.overflowing, whole.vanishing, whole.shortened,
    )  # fmt: skip
    assert pieces.lost == pytest.approx(whole.lost, rel=1e-9)  # the same sums in another order


FAULTS = [
    ([1e5, 1], FP16, "constant 'c' holds 1e+05, fp16 ends at 65504"),
    ([-3.4e38, 0], FP16, "constant 'c' holds -3.4e+38, fp16 ends at 65504"),
    (1e-12, FP16, "constant 'c' is 1e-12, fp16 is precise from 6.1e-05 on"),
    (1e-6, FP16, "constant 'c' is 1e-06, fp16 is precise from 6.1e-05 on"),
    ([1e-7, 2e-7], FP16, "constant 'c' is too small as a whole, fp16 is precise from 6.1e-05 on"),
    (-3.4028235e38, BF16, "constant 'c' holds -3.403e+38, bf16 ends at 3.38953e+38"),
]
FITS = [
    (1e-5, FP16),  # loses 3 of 11 bits
    ([1.0, 1e-12], FP16),  # nothing beside the 1
    ([0.0], FP16),
    ([], FP16),
    ([-np.inf, 0], FP16),
    (1e-12, BF16),
    (1e5, BF16),
]


@pytest.mark.parametrize(("numbers", "format_", "reason"), FAULTS)
def test_what_does_not_fit_says_what_it_is_and_what_fits(numbers, format_, reason):
    assert look(numbers, format_).fault("c", format_) == reason


@pytest.mark.parametrize(("numbers", "format_"), FITS)
def test_what_fits_has_no_fault(numbers, format_):
    assert look(numbers, format_).fault("c", format_) is None


def test_weights_are_converted_when_they_are_read_and_not_before():
    reads = []

    def read() -> np.ndarray:
        reads.append(1)
        return np.array([1 / 3, 2], np.float32)

    value = ir.Value(name="w", const_value=lazy("w", ir.DataType.FLOAT, (2,), read))
    tensor = constants.narrowed(value, ir.DataType.BFLOAT16)
    assert not reads
    assert (tensor.dtype, tensor.nbytes) == (ir.DataType.BFLOAT16, 4)
    assert not reads
    assert tensor.numpy().tolist() == [ml_dtypes.bfloat16(1 / 3), 2]
    assert len(reads) == 1
