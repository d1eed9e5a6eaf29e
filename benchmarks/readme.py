"""Puts generated tables into the README."""

from __future__ import annotations

import sys
from pathlib import Path


def replace_between(readme: Path, begin: str, end: str, text: str) -> None:
    """Put ``text`` between two lines; where they are missing, the program ends."""
    before, first, rest = readme.read_text("utf-8").partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        sys.exit(f"{readme} lacks the lines '{begin}' and '{end}', between which the table goes.")
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}", "utf-8")
