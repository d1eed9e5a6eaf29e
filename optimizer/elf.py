"""Reads which shared libraries an ELF file asks for, without loading or running it.

Layout: System V Application Binary Interface, chapters 4 (object files) and 5 (program loading);
the tag numbers are those of its "Dynamic Section" and of the GNU extensions (``DT_RUNPATH``).
Names of libraries are what ``ld.so`` looks for; the format of its cache is glibc's
``dl-cache.h`` (``glibc-ld.so.cache1.1``).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from optimizer.errors import UnsupportedError

_MACHINES = {3: "i386", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_SONAME, _DT_RPATH, _DT_RUNPATH = 0, 1, 5, 14, 15, 29
#: Bytes read for one name: longer than any path the system accepts (PATH_MAX).
_NAME_BYTES = 4096
#: Entries of a dynamic section; real ones have about forty.
_MOST_ENTRIES = 4096

_CACHE_MAGIC = b"glibc-ld.so.cache1.1"
_CACHE_HEADER = struct.Struct("<20sIIBxxxI12x")
_CACHE_ENTRY = struct.Struct("<iIIIQ")


@dataclass(frozen=True)
class Dynamic:
    """What the dynamic section of a library says.

    Attributes:
        machine: Processor it is built for, as ``platform.machine`` spells it.
        bits: 32 or 64.
        needed: Names of the libraries it asks for, in order (``DT_NEEDED``).
        soname: Its own name, which others ask for.
        rpath: Folders to look in before ``LD_LIBRARY_PATH``; without effect beside ``runpath``.
        runpath: Folders to look in after ``LD_LIBRARY_PATH``.
    """

    machine: str
    bits: int
    needed: tuple[str, ...] = ()
    soname: str | None = None
    rpath: tuple[str, ...] = ()
    runpath: tuple[str, ...] = ()


def read_dynamic(path: Path) -> Dynamic:
    """Read the dynamic section of a library.

    Raises:
        UnsupportedError: The file cannot be read, or is no ELF file; says which.
    """
    try:
        with path.open("rb") as file:
            return _read(file)
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}"
        raise UnsupportedError(msg) from error
    except (struct.error, ValueError, OverflowError) as error:
        msg = f"{path}: is no complete ELF library: {error}"
        raise UnsupportedError(msg) from error


def _read(file: BinaryIO) -> Dynamic:
    head = file.read(64)
    if len(head) < 64 or head[:4] != b"\x7fELF" or head[4] not in (1, 2) or head[5] not in (1, 2):
        raise ValueError("it does not start as one")
    bits, order = 32 * head[4], "<" if head[5] == 1 else ">"
    machine = struct.unpack_from(f"{order}H", head, 18)[0]
    word = "I" if bits == 32 else "Q"
    table = struct.unpack_from(f"{order}{word}", head, 28 if bits == 32 else 32)[0]
    size, count = struct.unpack_from(f"{order}HH", head, 42 if bits == 32 else 54)
    segments = list(_segments(file, order, bits, table, size, count))
    entries: list[tuple[int, int]] = []
    for kind, offset, _, length in segments:
        if kind == _PT_DYNAMIC:
            entries = list(_entries(file, f"{order}{word}{word}", offset, length))
    strings = next((value for tag, value in entries if tag == _DT_STRTAB), None)
    found: dict[int, list[str]] = {}
    if strings is not None:
        start = _offset_of(strings, segments)
        for tag, value in entries:
            if tag in (_DT_NEEDED, _DT_SONAME, _DT_RPATH, _DT_RUNPATH):
                found.setdefault(tag, []).append(_name_at(file, start + value))
    rpath, runpath = (
        tuple(item for text in found.get(tag, ()) for item in text.split(":") if item)
        for tag in (_DT_RPATH, _DT_RUNPATH)
    )
    return Dynamic(
        machine=_MACHINES.get(machine, f"machine {machine}"),
        bits=bits,
        needed=tuple(found.get(_DT_NEEDED, ())),
        soname=next(iter(found.get(_DT_SONAME, ())), None),
        rpath=rpath,
        runpath=runpath,
    )


def _segments(
    file: BinaryIO, order: str, bits: int, table: int, size: int, count: int
) -> Iterator[tuple[int, int, int, int]]:
    """(kind, offset in the file, address, bytes in the file) of each program header."""
    for index in range(count):
        file.seek(table + index * size)
        if bits == 32:  # p_type, p_offset, p_vaddr, p_paddr, p_filesz
            kind, offset, address, _, length = struct.unpack(f"{order}5I", file.read(20))
        else:  # p_type, p_flags, p_offset, p_vaddr, p_paddr, p_filesz
            kind, _, offset, address, _, length = struct.unpack(f"{order}IIQQQQ", file.read(40))
        yield kind, offset, address, length


def _entries(file: BinaryIO, layout: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
    pair = struct.Struct(layout)
    file.seek(offset)
    for _ in range(min(length // pair.size, _MOST_ENTRIES)):
        tag, value = pair.unpack(file.read(pair.size))
        if tag == _DT_NULL:
            return
        yield tag, value


def _offset_of(address: int, segments: list[tuple[int, int, int, int]]) -> int:
    """Where in the file the byte lies that is loaded at ``address``."""
    for kind, offset, start, length in segments:
        if kind == _PT_LOAD and start <= address < start + length:
            return address - start + offset
    raise ValueError("its table of names lies outside of what it loads")


def _name_at(file: BinaryIO, offset: int) -> str:
    file.seek(offset)
    text, end, _ = file.read(_NAME_BYTES).partition(b"\0")
    if not end:
        raise ValueError("a name in it has no end")
    return text.decode("utf-8", "replace")


def read_loader_cache(path: Path) -> list[tuple[str, str]]:
    """(name, path) of every library in the cache of the dynamic loader, in its order.

    An unreadable cache or one of another system is empty: the loader then has none either.
    """
    try:
        data = path.read_bytes()
    except OSError:
        return []
    start = data.find(_CACHE_MAGIC)  # an older cache may stand in front of it
    if start < 0:
        return []
    data = data[start:]
    found = []
    try:
        _, count, *_ = _CACHE_HEADER.unpack_from(data)
        for index in range(min(count, len(data) // _CACHE_ENTRY.size)):
            place = _CACHE_HEADER.size + index * _CACHE_ENTRY.size
            _, key, value, _, _ = _CACHE_ENTRY.unpack_from(data, place)
            found.append((_text(data, key), _text(data, value)))
    except (struct.error, ValueError):
        return []
    return found


def _text(data: bytes, offset: int) -> str:
    return data[offset : data.index(b"\0", offset)].decode("utf-8", "replace")
