"""Versions and requirements of Python distributions, as far as comparing them needs.

Covers what version specifiers compare by release number (the Python packaging specification
"Version specifiers"): pre-releases, post-releases and local versions count as their release.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_RELEASE = re.compile(r"v?(?:\d+!)?(\d+(?:\.\d+)*)")
_CLAUSE = re.compile(r"(~=|===?|!=|<=|>=|<|>)\s*([^\s,;]+)")
_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^\]]*\])?\s*\(?(?P<range>[^;)@]*)\)?"
    r"\s*(?:;\s*(?P<marker>.*))?$"
)
_EXTRA = re.compile(r"""extra\s*==\s*['"]([\w.-]+)['"]""")


@dataclass(frozen=True)
class Requirement:
    """A distribution that is needed in certain versions.

    Attributes:
        name: Normalized.
        range: Such as ">=1.30,<2"; empty = any.
        extra: Extra that it belongs to; None = always needed.
        condition: What else must hold, as written; empty = nothing.
    """

    name: str
    range: str
    extra: str | None = None
    condition: str = ""

    def __str__(self) -> str:
        """As in a requirements file."""
        return f"{self.name}{self.range}" + ("" if self.extra is None else f" [{self.extra}]")


def normalize(name: str) -> str:
    """The one spelling of a distribution's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def release(version: str) -> tuple[int, ...]:
    """The release numbers of a version, without zeros at the end; empty where it has none."""
    found = _RELEASE.match(version.strip())
    if found is None:
        return ()
    numbers = [int(part) for part in found[1].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def satisfies(version: str, wanted: str) -> bool:
    """Whether ``version`` is in the range ``wanted``, such as ``>=1.30,<2``."""
    return all(_holds(release(version), *clause) for clause in _CLAUSE.findall(wanted))


def _holds(found: tuple[int, ...], operator: str, text: str) -> bool:
    limit = release(text)
    if operator == "~=" or text.endswith(".*"):  # what stands before the last part must be equal
        prefix = [int(part) for part in text.split(".")[:-1] if part.isdecimal()]
        same = [*found, *[0] * len(prefix)][: len(prefix)] == prefix
        return same != (operator == "!=") and (operator != "~=" or found >= limit)
    return {
        "<": found < limit,
        "<=": found <= limit,
        ">": found > limit,
        ">=": found >= limit,
        "!=": found != limit,
    }.get(operator, found == limit)


def parse_requirement(text: str) -> Requirement | None:
    """A line such as ``onnxruntime>=1.30,<2; extra == 'cpu'``, or None if it is none."""
    found = _REQUIREMENT.match(text.strip())
    if found is None:
        return None
    marker = found["marker"] or ""
    extra = _EXTRA.search(marker)
    condition = _EXTRA.sub("", marker).strip().removesuffix("and").removeprefix("and").strip(" ()")
    return Requirement(
        normalize(found["name"]),
        found["range"].replace(" ", ""),
        None if extra is None else extra[1],
        condition,
    )
