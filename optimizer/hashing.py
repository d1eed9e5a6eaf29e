"""SHA-256 of files, beside other work."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

_CHUNK = 1 << 20


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as hex digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class BackgroundHashes:
    """SHA-256 of files, computed by a thread while the caller does something else."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._digests: dict[Path, str] = {}
        self._paths = tuple(dict.fromkeys(paths))
        # A daemon, so that an interrupted program does not wait for it.
        self._thread = threading.Thread(target=self._compute, daemon=True)
        self._thread.start()

    def _compute(self) -> None:
        for path in self._paths:
            with contextlib.suppress(OSError):  # reported by ``items``, which tries again
                self._digests[path] = hash_file(path)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, in order."""
        return self._paths

    def items(self) -> list[tuple[Path, str]]:
        """(file, digest) of each file, in order; waits for the thread.

        Raises:
            OSError: A file cannot be read any more.
        """
        self._thread.join()
        return [(path, self._digests.get(path) or hash_file(path)) for path in self._paths]


class GrowingHash:
    """SHA-256 of a file that is being written, by a thread that reads what is there already.

    A context manager: whatever happens, the thread ends with it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._path = file, Path(file.name)
        self._digest: str | None = None
        self._size, self._seen, self._ended = 0, 0, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def grown(self) -> None:
        """Say that the file is longer than it was; what is there will not change."""
        self._file.flush()
        with self._changed:
            self._size = self._file.tell()
            self._changed.notify()

    def digest(self) -> str:
        """Of the file as it is now, complete, as hex digits.

        Raises:
            OSError: The file cannot be read.
        """
        self.grown()
        self._end()
        return self._digest or hash_file(self._path)

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def _follow(self) -> None:
        result = hashlib.sha256()
        view = memoryview(bytearray(_CHUNK))
        with contextlib.suppress(OSError), self._path.open("rb", buffering=0) as file:
            while (size := self._next()) is not None:
                while file.tell() < size:
                    count = file.readinto(view[: size - file.tell()])
                    if not count:
                        return  # cut short by somebody else: ``digest`` takes it as it is
                    result.update(view[:count])
            self._digest = result.hexdigest()

    def _next(self) -> int | None:
        """Size of the file when it has grown, None at its end."""
        with self._changed:
            self._changed.wait_for(lambda: self._size > self._seen or self._ended)
            grown, self._seen = self._size > self._seen, self._size
            return self._size if grown else None
