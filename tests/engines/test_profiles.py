"""Optimization profiles: what words mean, what follows, and what contradicts."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from optimizer.engines.profiles import make_profiles, parse_shapes
from optimizer.errors import OptionError


def value(name: str, *shape: int | str | None) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT64))


IDS = value("input_ids", "batch", "sequence")
MASK = value("attention_mask", "batch", "past + sequence")
PAST = value("past_key", "batch", 4, "past", 16)


def test_defaults_follow_from_names_and_sums_from_their_parts():
    (profile,) = make_profiles([IDS, MASK, PAST])
    assert profile["input_ids"] == ((1, 1), (1, 128), (8, 512))
    assert profile["past_key"] == ((1, 4, 0, 16), (1, 4, 128, 16), (8, 4, 512, 16))
    assert profile["attention_mask"] == ((1, 1), (1, 256), (8, 1024))


def test_an_axis_that_is_given_once_holds_everywhere():
    (profile,) = make_profiles([IDS, MASK, PAST], ["input_ids:2x3,2x4,2x5"])
    assert profile["past_key"][1] == (2, 4, 128, 16)
    assert profile["attention_mask"] == ((2, 3), (2, 132), (2, 517))


def test_the_second_mention_begins_the_second_profile_and_one_shape_is_all_three():
    first, second = make_profiles([IDS], ["input_ids:1x1,1x8,1x64", "input_ids:8x16"])
    assert first["input_ids"] == ((1, 1), (1, 8), (1, 64))
    assert second["input_ids"] == ((8, 16), (8, 16), (8, 16))


def test_axes_of_other_names_for_past_and_new_tokens_together():
    mask = value("attention_mask", "batch", "total_sequence")
    (profile,) = make_profiles([IDS, mask, PAST], ["input_ids:1x1"])
    assert profile["attention_mask"] == ((1, 1), (1, 129), (1, 513))
    with pytest.raises(OptionError, match="add up to"):
        make_profiles([IDS, mask, PAST], ["attention_mask:1x7"])
    with pytest.raises(OptionError, match="add up to"):
        make_profiles([IDS, mask, PAST], ["input_ids:1x8", "attention_mask:1x7"])
    (profile,) = make_profiles([IDS, mask, PAST], ["input_ids:1x1", "attention_mask:1x7"])
    assert profile["past_key"][1] == (1, 4, 6, 16)


def test_lengths_that_nobody_gave_have_a_limit():
    (profile,) = make_profiles([IDS, PAST], ["past_key:1x4x0x16,1x4x99x16,1x4x400x16"], 64)
    assert profile["input_ids"] == ((1, 1), (1, 64), (1, 64))
    assert profile["past_key"][2] == (1, 4, 400, 16)


def test_what_an_encoder_gave_has_a_length_of_its_own():
    states = value("encoder_hidden_states", "batch", "source", 64)
    mask = value("encoder_attention_mask", "batch", "encoder_sequence_length")
    crossed = value("past_key_values.0.encoder.key", "batch", 4, "source", 16)
    inputs = [IDS, states, mask, crossed, PAST]
    (profile,) = make_profiles(inputs)
    assert profile["encoder_hidden_states"] == ((1, 1, 64), (1, 128, 64), (8, 1536, 64))
    assert profile["encoder_attention_mask"] == ((1, 1), (1, 128), (8, 1536))
    assert profile["past_key_values.0.encoder.key"][2] == (8, 4, 1536, 16)
    assert profile["past_key"][2] == (8, 4, 512, 16)
    (profile,) = make_profiles(inputs, ["encoder_hidden_states:2x7x64"], 64)
    assert profile["past_key_values.0.encoder.key"][0] == (2, 4, 7, 16)
    assert profile["encoder_attention_mask"][2] == (2, 192)
    # It is no part of the total of the decoder's own tokens.
    total = value("attention_mask", "batch", "total_sequence")
    (profile,) = make_profiles([*inputs, total], ["input_ids:1x1"])
    assert profile["attention_mask"] == ((1, 1), (1, 129), (1, 513))


def test_names_with_colons_and_static_models():
    assert parse_shapes(["scope/x:0:1x2"]) == [{"scope/x:0": ((1, 2), (1, 2), (1, 2))}]
    assert make_profiles([value("x", 1, 4)]) == []
    assert make_profiles([value("x", 1, 4)], ["x:1x4"]) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["input_ids"], "expected NAME:MIN,OPT,MAX"),
        (["input_ids:1x2,3x4"], "expected NAME:MIN,OPT,MAX"),
        (["input_ids:1x-2"], "expected NAME:MIN,OPT,MAX"),
        (["input_ids:2x1,1x1,4x4"], "MIN <= OPT"),
        (["input_ids:1x1,1x1,1x99999999999"], "MIN <= OPT"),
        (["input_ids:1x1,1,1x1"], "one rank"),
        (["input_id:1x1"], "did you mean 'input_ids'?"),
        (["input_ids:1x1x1"], "has 2 axes [batch, sequence], found 3"),
        (["past_key:1x5x0x16"], "axis 1 of 'past_key' is always 4, found [5, 5, 5]"),
        (["input_ids:1x1", "attention_mask:2x1"], "axis 'batch' is [1, 1, 1] in 'input_ids' but"),
        (["input_ids:1x2", "past_key:1x4x3x16", "attention_mask:1x4"], "add up to [5, 5, 5]"),
    ],
)
def test_contradictions_are_named(words, said):
    with pytest.raises(OptionError) as error:
        make_profiles([IDS, MASK, PAST], words)
    assert said in str(error.value)


def test_an_axis_of_unknown_role_must_be_given():
    with pytest.raises(OptionError, match="how long axis 'width' of input 'x' is"):
        make_profiles([value("x", "width")])
    assert make_profiles([value("x", "width")], ["x:1,2,3"]) == [{"x": ((1,), (2,), (3,))}]
    with pytest.raises(OptionError, match=r"axis 'x\[0\]'"):
        make_profiles([value("x", None)])
    with pytest.raises(OptionError, match="has no shape"):
        make_profiles([ir.Value(name="x")])
