"""Hashes of files that grow."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from optimizer.hashing import GrowingHash

PIECES = [b"", b"a" * 10, b"b" * (3 << 20), b"c"]


@pytest.mark.parametrize("announced", [True, False])
def test_the_digest_is_that_of_the_whole_file(tmp_path: Path, announced: bool) -> None:
    path = tmp_path / "f"
    with path.open("xb") as file, GrowingHash(file) as growing:
        for piece in PIECES:
            file.write(piece)
            if announced:
                growing.grown()
        digest = growing.digest()
    assert digest == hashlib.sha256(b"".join(PIECES)).hexdigest()


def test_the_thread_ends_when_writing_fails(tmp_path: Path) -> None:
    before = threading.active_count()

    def write() -> None:
        with (tmp_path / "f").open("xb") as file, GrowingHash(file):
            file.write(b"x")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write()
    assert threading.active_count() == before
