"""A folder for one model, and who looks or writes outside of it.

Python's own calls are seen by an audit hook. Native code is seen by the kernel: inotify reports who
opens anything in the folder beside the model's and in the working directory, which hold what a
model could be after.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import struct
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from fuzzing.files import OUTSIDE, Special, aimed

_SECRET = b"not for models" * 10
_OPEN, _MODIFY, _CREATE, _DELETE, _MOVED = 0x20, 0x2, 0x100, 0x200, 0xC0
_EVENT = struct.Struct("iIII")
#: What the interpreter and its libraries may read, and what says nothing.
_SYSTEM = tuple(
    os.path.realpath(path)
    for path in (*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, "/proc", "/sys")
)
#: ``platform`` reads the first, our own measuring of peak memory writes the second.
_HARMLESS = (
    "/etc/os-release",
    "/usr/lib/os-release",
    os.devnull,
    f"/proc/{os.getpid()}/clear_refs",
)
_WRITES = (
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate",
    "os.chmod", "shutil.rmtree", "shutil.move",
)  # fmt: skip
_NEVER = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")


class Sandbox:
    """``root/models/in`` for the model, ``root/out`` for results, everything else is watched."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.inside = root / "models" / "in"
        self.outside = root / "models" / "outside"
        self.out = root / "out"
        self.here = root / "here"
        self._seen: list[str] = []
        self._watching = False
        source = Path(__file__).resolve().parent.parent.parent
        self._allowed = (*_SYSTEM, str(source), str(self.inside), str(self.out))
        for folder in (self.outside, self.here):
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("secret.bin", "data.bin", "model.onnx", "x"):
                (folder / name).write_bytes(_SECRET)
        os.chdir(self.here)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._notify = self._libc.inotify_init1(os.O_NONBLOCK)
        for folder in (self.outside, self.here):
            mask = _OPEN | _MODIFY | _CREATE | _DELETE | _MOVED
            self._libc.inotify_add_watch(self._notify, os.fsencode(folder), mask)
        sys.addaudithook(self._audit)

    def place(self, model: bytes, files: Mapping[str, bytes | Special]) -> Path:
        """An empty folder with the model and what lies beside it; returns the model's path."""
        for folder in (self.inside, self.out):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        for name, content in files.items():
            self._write(self.inside / name, content)
        path = self.inside / "model.onnx"
        path.write_bytes(aimed(model, str(self.outside)))
        return path

    def _write(self, path: Path, content: bytes | Special) -> None:
        if isinstance(content, bytes):
            path.write_bytes(content)
            return
        target = content.target.replace(OUTSIDE, str(self.outside))
        if content.kind == "symlink":
            path.symlink_to(target)
        elif content.kind == "hardlink":
            os.link(target, path)
        elif content.kind == "fifo":
            os.mkfifo(path)
        elif content.kind == "folder":
            path.mkdir()
        else:
            with path.open("wb") as file:
                file.truncate(content.size)

    @contextlib.contextmanager
    def watch(self) -> Iterator[list[str]]:
        """Collect what is opened or changed outside; the list is complete at the end."""
        self._seen = seen = []
        self.resume()
        try:
            yield seen
        finally:
            self.pause()

    def pause(self) -> None:
        """What follows is not the tool's doing."""
        if self._watching:
            self._seen += [f"native access to {name}" for name in self._events()]
            self._watching = False

    def resume(self) -> None:
        """The tool goes on."""
        self._events()
        self._watching = True

    def leftovers(self) -> list[str]:
        """Temporary files that were not removed."""
        return [item.name for item in self.out.iterdir() if item.name.endswith(".tmp")]

    def _events(self) -> list[str]:
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                data = os.read(self._notify, 1 << 16)
                while data:
                    _, mask, _, size = _EVENT.unpack_from(data)
                    name = data[_EVENT.size : _EVENT.size + size].rstrip(b"\0")
                    if name:
                        found.append(f"{os.fsdecode(name)} ({mask:#x})")
                    data = data[_EVENT.size + size :]
        return found

    def _audit(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self._watching:
            return
        if event in _NEVER:
            self._seen.append(event)
        elif event in _WRITES:
            if not self._within(arguments[0], (str(self.out),)):
                self._seen.append(f"{event} {arguments[0]!r}")
        elif event == "open":
            path, mode, flags = (*arguments, None, 0)[:3]
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            allowed = (str(self.out),) if writes else self._allowed
            if not isinstance(path, int) and not self._within(path, allowed):
                self._seen.append(f"open {path!r} {mode} {flags}")

    @staticmethod
    def _within(path: object, folders: tuple[str, ...]) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return True
        try:
            real = os.path.realpath(os.fsdecode(path))
        except ValueError:  # a name that no file can have
            return True
        return real in _HARMLESS or real.startswith(tuple(f"{f}/" for f in folders))
