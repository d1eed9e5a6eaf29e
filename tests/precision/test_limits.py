"""The two formats in numbers that the standards give."""

from __future__ import annotations

import numpy as np

from optimizer.precision.limits import BF16, FP16


def test_float16_is_that_of_ieee_754():
    assert FP16.largest == 65504
    assert FP16.tiny == 2.0**-14
    assert FP16.smallest == 2.0**-24
    assert FP16.roundoff == 2.0**-11
    assert FP16.terms == 2048
    assert FP16.overflows


def test_bfloat16_has_the_range_of_float32_and_8_bits():
    assert BF16.largest == (2 - 2.0**-7) * 2.0**127
    assert BF16.tiny == np.finfo(np.float32).tiny
    assert BF16.roundoff == 2.0**-8
    assert BF16.terms == 256
    assert not BF16.overflows


def test_a_sum_of_as_many_ones_takes_up_no_more():
    for format_ in (FP16, BF16):
        kind = format_.dtype.numpy()
        full = np.array(format_.terms, kind)
        assert full + np.array(1, kind) == full
        assert full - np.array(1, kind) != full


def test_each_converts_the_other_and_float32():
    assert {d.name for d in FP16.sources} == {"FLOAT", "BFLOAT16"}
    assert {d.name for d in BF16.sources} == {"FLOAT", "FLOAT16"}
