from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

import passes
from optimizer.errors import OptionError
from passes.canonicalize import Canonicalize

OWN = """
from optimizer.pass_base import Exactness, GraphPass

class Mine(GraphPass):
    name = "mine"
    exactness = Exactness.BITWISE

NotOne = 3
"""


def test_a_pass_is_found_by_its_name():
    assert passes.get_pass("canonicalize") is Canonicalize


def test_names_are_known_without_importing_a_pass():
    code = "import passes, sys; print(passes.PASS_NAMES); sys.exit('onnx_ir' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "canonicalize" in done.stdout


@pytest.mark.parametrize(
    ("name", "hint"), [("cannonicalize", "did you mean 'canonicalize'?"), ("zzz", "known passes: ")]
)
def test_an_unknown_name_is_an_option_error_with_help(name, hint):
    with pytest.raises(OptionError, match=f"there is no pass '{name}'") as caught:
        passes.get_pass(name)
    assert hint in str(caught.value)


def test_a_class_in_a_file_is_a_pass(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    assert passes.get_pass(f"{file}:Mine").name == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [("own.py:Other", "defines no 'Other'"), ("own.py:NotOne", "expected a subclass"),
     ("missing.py:Mine", "does not exist")],
)  # fmt: skip
def test_a_file_without_such_a_pass_is_an_option_error(tmp_path, name, message):
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(OptionError, match=message):
        passes.get_pass(f"{tmp_path}/{name}")


def test_installed_distributions_add_passes(monkeypatch):
    point = importlib.metadata.EntryPoint(
        "theirs", "passes.canonicalize:Canonicalize", passes.ENTRY_POINT_GROUP
    )
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [point])
    assert passes.get_pass("theirs") is Canonicalize
    assert passes.all_names()[-1] == "theirs"
