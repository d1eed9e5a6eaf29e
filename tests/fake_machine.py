"""Machines made of a few small files, for ``optimizer.environment`` to look at."""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer.environment import Probe

_NEEDED, _STRTAB, _SONAME, _RPATH, _RUNPATH = 1, 5, 14, 15, 29
#: Where the only segment is loaded: not at its offset, so that addresses have to be translated.
_BASE = 0x10000


def elf(
    needed: Sequence[str] = (),
    *,
    soname: str | None = None,
    rpath: str | None = None,
    runpath: str | None = None,
    machine: int = 62,
    bits: int = 64,
    order: str = "<",
) -> bytes:
    """The smallest shared library with a dynamic section: header, two segments, names."""
    wide = bits == 64
    strings, tags = b"\0", []
    named = [(_NEEDED, name) for name in needed]
    named += [(_SONAME, soname), (_RPATH, rpath), (_RUNPATH, runpath)]
    for tag, text in named:
        if text is not None:
            tags.append((tag, len(strings)))
            strings += text.encode() + b"\0"
    header, entry = (64, 56) if wide else (52, 32)
    start = header + 2 * entry
    pair = order + ("QQ" if wide else "II")
    length = struct.calcsize(pair) * (len(tags) + 2)
    tags += [(_STRTAB, _BASE + start + length), (0, 0)]
    dynamic = b"".join(struct.pack(pair, *item) for item in tags)
    total = start + len(dynamic) + len(strings)
    load, section = (1, 0, _BASE, total), (2, start, _BASE + start, length)
    segments = b""
    for kind, offset, address, size in (load, section):
        if wide:
            fields = (kind, 4, offset, address, address, size, size, 8)
            segments += struct.pack(f"{order}IIQQQQQQ", *fields)
        else:
            fields = (kind, offset, address, address, size, size, 4, 4)
            segments += struct.pack(f"{order}8I", *fields)
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2, 1]) + bytes(9)
    words = (3, machine, 1, 0, header, 0, 0, header, entry, 2, 0, 0, 0)
    layout = "HHIQQQIHHHHHH" if wide else "HHIIIIIHHHHHH"
    content = ident + struct.pack(order + layout, *words) + segments + dynamic + strings
    return content + bytes(max(0, 64 - len(content)))


def loader_cache(entries: Sequence[tuple[str, str]]) -> bytes:
    """``/etc/ld.so.cache`` of (name, path) entries."""
    place, strings, rows = 48 + 24 * len(entries), b"", b""
    for name, path in entries:
        key = place + len(strings)
        strings += name.encode() + b"\0"
        rows += struct.pack("<iIIIQ", 0x303, key, place + len(strings), 0, 0)
        strings += path.encode() + b"\0"
    head = struct.pack("<20sIIBxxxI12x", b"glibc-ld.so.cache1.1", len(entries), len(strings), 2, 0)
    return head + rows + strings


@dataclass
class Machine:
    """A file system, a folder of Python packages, and a folder of programs, all below ``base``."""

    base: Path

    def __post_init__(self) -> None:
        for folder in (self.root, self.site, self.programs, self.home):
            folder.mkdir(parents=True)
        # Stand-ins for the libraries that are always needed: the real ones take long to import.
        for name in ("numpy", "ml_dtypes", "pydantic", "onnx_ir"):
            self.module(f"{name}.py")
        self.module("onnx/__init__.py", "IR_VERSION = 11")
        self.module("onnx/defs.py", "def onnx_opset_version():\n    return 24\n")

    @property
    def root(self) -> Path:
        """Its ``/``."""
        return self.base / "root"

    @property
    def site(self) -> Path:
        """Its ``site-packages``."""
        return self.base / "site"

    @property
    def programs(self) -> Path:
        """Its ``PATH``."""
        return self.base / "bin"

    @property
    def home(self) -> Path:
        """Where its user is."""
        return self.base / "home"

    def probe(self, *more: Path, **changes: Any) -> Probe:
        """Looks at this machine; ``more`` are further folders of packages."""
        settings: dict[str, Any] = {
            "root": self.root,
            "search_path": (self.site, *more),
            "own": self.site,
            "working": self.home,
            "environment": {"PATH": f"{self.programs}:/usr/bin:/bin", "TMPDIR": str(self.home)},
            "python": sys.executable,
            "system": "linux",
            **changes,
        }
        return Probe(**settings)

    def file(self, path: str, content: str | bytes) -> Path:
        """A file of the system."""
        return _write(self.root / path.lstrip("/"), content)

    def module(self, path: str, content: str | bytes = "") -> Path:
        """A file in ``site-packages``."""
        return _write(self.site / path, content)

    def program(self, name: str, script: str) -> Path:
        """A shell script on the ``PATH``."""
        path = _write(self.programs / name, f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def library(self, path: str, needed: Sequence[str] = (), **more: Any) -> Path:
        """A shared library: of the system, and in the loader's cache, where the path begins so."""
        if not path.startswith("/"):
            return self.module(path, elf(needed, **more))
        made = self.file(path, elf(needed, **more))
        below = sorted((self.root / "usr/local/lib").glob("*.so*"))
        self.file(
            "/etc/ld.so.cache",
            loader_cache([(item.name, f"/usr/local/lib/{item.name}") for item in below]),
        )
        return made

    def install(
        self,
        name: str,
        version: str,
        *,
        requires: Sequence[str] = (),
        files: Sequence[str] = (),
        site: Path | None = None,
    ) -> Path:
        """The metadata of a distribution."""
        folder = (site or self.site) / f"{name.replace('-', '_')}-{version}.dist-info"
        lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {item}" for item in requires]
        _write(folder / "METADATA", "\n".join(lines) + "\n\nVersion: of the description\n")
        _write(folder / "RECORD", "".join(f"{item},sha256=x,1\n" for item in files))
        return folder

    def onnxruntime(
        self,
        wheel: str = "onnxruntime",
        version: str = "1.31.1",
        *,
        cuda: str | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        code: str = "",
    ) -> None:
        """An ONNX Runtime that can be imported, unless ``code`` prevents it."""
        self.install(wheel, version, files=["onnxruntime/__init__.py"])
        says = f"package_name = '{wheel}'\n__version__ = '{version}'\n"
        says += "" if cuda is None else f"cuda_version = '{cuda}'\n"
        self.module("onnxruntime/capi/build_and_package_info.py", says)
        body = f"__version__ = '{version}'\n"
        body += f"def get_available_providers():\n    return {list(providers)!r}\n"
        self.module("onnxruntime/__init__.py", code or body)

    def gpu(self, name: str = "NVIDIA L4", capability: str = "8.9", driver: str = "580.95") -> None:
        """A GPU that nvidia-smi knows."""
        self.program("nvidia-smi", f"echo '{name}, {capability}, {driver}, 23034'")


def _write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
