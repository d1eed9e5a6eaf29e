"""The slots of ONNX Runtime's C interface against its header, where one is at hand.

ONNXRUNTIME_INCLUDE_DIR names the folder of onnxruntime_c_api.h (a package of ONNX Runtime for C++
has it). Every other test of the native operators uses the slots, but a wrong one that nothing
calls yet would not show there.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ABI = Path(__file__).resolve().parent.parent / "plugins" / "common" / "ort_abi.h"
#: The ways in which the header declares a member of OrtApi.
MEMBER = re.compile(
    r"ORT_API2_STATUS\((\w+)|ORT_CLASS_RELEASE\((\w+)\)"
    r"|(?:const char\*|OrtErrorCode|void|OrtStatus\*)\s*\(\s*ORT_API_CALL\s*\*\s*(\w+)\s*\)"
)


def members(header: str) -> list[str]:
    """Names of OrtApi's members in order."""
    text = header[header.index("struct OrtApi {") :]
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    text = text[: text.index("\n};")]
    return [m[1] or (f"Release{m[2]}" if m[2] else m[3]) for m in MEMBER.finditer(text)]


def slots() -> dict[str, int]:
    """Ours."""
    text = ABI.read_text("utf-8").split("enum Slot", 1)[1].split("};", 1)[0]
    return {name: int(number) for name, number in re.findall(r"(\w+) = (\d+),", text)}


def test_members_are_counted_in_order():
    header = """
    struct OrtApi {
      OrtStatus*(ORT_API_CALL* CreateStatus)(OrtErrorCode code);  /// void(ORT_API_CALL* No)
      ORT_API2_STATUS(CreateEnv, int level);
      /* ORT_API2_STATUS(Hidden, int level); */
      ORT_CLASS_RELEASE(Env);
    };
    ORT_API2_STATUS(After, int x);
    """.replace("\n    ", "\n")
    assert members(header) == ["CreateStatus", "CreateEnv", "ReleaseEnv"]
    assert slots()["CreateStatus"] == 0
    assert len(set(slots().values())) == len(slots()) > 15


@pytest.mark.native
def test_slots_are_those_of_the_header():
    folder = os.environ.get("ONNXRUNTIME_INCLUDE_DIR")
    if folder is None:
        pytest.skip("ONNXRUNTIME_INCLUDE_DIR names no folder with onnxruntime_c_api.h")
    found = members((Path(folder) / "onnxruntime_c_api.h").read_text("utf-8"))
    for name, slot in slots().items():
        if slot < len(found):  # an older header ends earlier
            assert found[slot] == name
