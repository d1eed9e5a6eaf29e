"""Reading what a shared library asks for, from files made here and from those of this Python."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
from fake_machine import elf, loader_cache
from hypothesis import given
from hypothesis import strategies as st

from optimizer.elf import Dynamic, read_dynamic, read_loader_cache
from optimizer.errors import UnsupportedError


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "lib.so"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("bits", "order", "machine", "name"), [
    (64, "<", 62, "x86_64"), (64, "<", 183, "aarch64"), (32, "<", 3, "i386"),
    (64, ">", 21, "machine 21"), (32, ">", 40, "arm"),
])  # fmt: skip
def test_all_fields_are_read_in_every_class_and_byte_order(
    tmp_path: Path, bits: int, order: str, machine: int, name: str
) -> None:
    content = elf(
        ["libnvinfer.so.10", "libc.so.6"],
        soname="libx.so.1",
        rpath="$ORIGIN:/opt/a",
        runpath="$ORIGIN/../lib",
        bits=bits,
        order=order,
        machine=machine,
    )
    assert read_dynamic(written(tmp_path, content)) == Dynamic(
        machine=name,
        bits=bits,
        needed=("libnvinfer.so.10", "libc.so.6"),
        soname="libx.so.1",
        rpath=("$ORIGIN", "/opt/a"),
        runpath=("$ORIGIN/../lib",),
    )


def test_a_library_without_needs_has_none(tmp_path: Path) -> None:
    found = read_dynamic(written(tmp_path, elf()))
    assert (found.needed, found.soname, found.rpath, found.runpath) == ((), None, (), ())


def test_what_a_real_compiler_wrote_is_read() -> None:
    program = Path(sys.executable).resolve()
    if sys.platform != "linux":
        with pytest.raises(UnsupportedError, match="is no complete ELF library"):
            read_dynamic(program)
        return
    assert any(name.startswith(("libc.so", "libc.musl")) for name in read_dynamic(program).needed)


@pytest.mark.parametrize(
    "content", [b"", b"\x7fELF", b"MZ" + bytes(100), b"\x7fELF\x09\x09" + bytes(100)]
)
def test_what_is_no_elf_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UnsupportedError, match=r"lib\.so: is no complete ELF library"):
        read_dynamic(written(tmp_path, content))


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"none\.so: cannot be read: No such file"):
        read_dynamic(tmp_path / "none.so")


WHOLE = elf(["liba.so.1", "libb.so.2"], soname="libc.so.3", runpath="$ORIGIN")


@given(st.integers(0, len(WHOLE)), st.binary(max_size=24), st.integers(0, 24))
def test_damaged_files_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: int, put: bytes, cut: int
) -> None:
    path = tmp_path_factory.mktemp("elf") / "lib.so"
    path.write_bytes(WHOLE[:place] + put + WHOLE[place + cut :])
    with contextlib.suppress(UnsupportedError):
        assert len(read_dynamic(path).needed) < 10


def test_the_cache_of_the_loader_is_read_in_order(tmp_path: Path) -> None:
    entries = [("liba.so.1", "/usr/lib/liba.so.1"), ("liba.so.1", "/lib/liba.so.1")]
    path = tmp_path / "ld.so.cache"
    path.write_bytes(loader_cache(entries))
    assert read_loader_cache(path) == entries
    path.write_bytes(b"ld.so-1.7.0 something older" + loader_cache(entries))
    assert read_loader_cache(path) == entries


@pytest.mark.parametrize("content", [b"", b"junk", loader_cache([("a", "b")])[:60]])
def test_a_damaged_cache_is_empty(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ld.so.cache"
    path.write_bytes(content)
    assert read_loader_cache(path) == []
    assert read_loader_cache(tmp_path / "none") == []
