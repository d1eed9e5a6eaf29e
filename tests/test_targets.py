from __future__ import annotations

import pytest

from optimizer.errors import OptionError
from optimizer.targets import DEFAULT_TARGET, TARGETS, get_target


def test_every_target_has_its_own_name_and_a_possible_opset():
    for name, target in TARGETS.items():
        assert target.name == name
        assert target.min_opset <= target.opset <= target.max_opset
        assert target.kv_cache[0] == "append"
        assert target.attention or target.max_opset < 23


def test_the_default_target_exists():
    assert get_target(DEFAULT_TARGET).runtime == "onnxruntime"


def test_an_unknown_target_is_named_with_the_nearest_one():
    with pytest.raises(
        OptionError, match=r"no target 'tensorrt-12'; did you mean 'tensorrt-1[01]'"
    ):
        get_target("tensorrt-12")
    with pytest.raises(OptionError, match="known targets: ort-cpu, ort-cuda"):
        get_target("xyz")
