"""Arithmetic on symbolic dimensions.

A dimension is an int or a polynomial over symbols in a normal form, so that two dimensions are the
same number for every feed if they compare equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

#: A sum of products of symbols: ((symbols, coefficient), ...) in a fixed order.
Polynomial = tuple[tuple[tuple[str, ...], int], ...]
Dim = int | Polynomial
Shape = tuple[Dim, ...]

#: No size of a tensor is larger, no product of more sizes or sum of more products is one; a graph
#: that squares a size again and again would fill the memory with what is none.
_MAX_SIZE, _MAX_DEGREE, _MAX_TERMS = 2**63 - 1, 16, 64


def add(left: Dim, right: Dim) -> Dim:
    """The sum of two dimensions.

    Raises:
        ValueError: It is beyond every size of a tensor.
    """
    return _from_terms([*_terms(left), *_terms(right)])


def multiply(left: Dim, right: Dim) -> Dim:
    """The product of two dimensions.

    Raises:
        ValueError: It is beyond every size of a tensor.
    """
    return _from_terms(
        (tuple(sorted(a + b)), x * y) for a, x in _terms(left) for b, y in _terms(right)
    )


def divide(left: Dim, right: Dim) -> Dim | None:
    """The exact quotient, None unless ``right`` is one product that divides every term."""
    divisor = _terms(right)
    if len(divisor) != 1 or divisor[0][1] == 0:
        return None
    symbols, factor = divisor[0]
    result = []
    for names, count in _terms(left):
        rest = list(names)
        for symbol in symbols:
            if symbol not in rest:
                return None
            rest.remove(symbol)
        if count % factor:
            return None
        result.append((tuple(rest), count // factor))
    return _from_terms(result)


def product(dims: Iterable[Dim]) -> Dim:
    """The product of several dimensions."""
    result: Dim = 1
    for dim in dims:
        result = multiply(result, dim)
    return result


def never_negative(dim: Dim) -> bool:
    """Whether no coefficient is negative; the symbols themselves are sizes."""
    return all(count >= 0 for _, count in _terms(dim))


def symbol(name: str) -> Dim:
    """The dimension called ``name``."""
    return (((name,), 1),)


def fresh(name: str) -> Dim:
    """A dimension nothing is known about; '?' keeps it apart from the model's own names."""
    return symbol(f"?{name}")


def left_over(source: Iterable[Dim], others: Iterable[Dim]) -> Dim | None:
    """What the product of ``source`` leaves beside that of ``others``; None if not exact."""
    remaining = list(source)
    divisor: Dim = 1
    for dim in others:
        if dim in remaining:
            remaining.remove(dim)  # sums, which ``divide`` does not divide by, too
        else:
            divisor = multiply(divisor, dim)
    return divide(product(remaining), divisor)


def balanced(target: Sequence[Dim], source: Shape) -> Shape:
    """``target`` with its one fresh size as what the others leave of the elements of ``source``.

    Both have the same number of elements, or a Reshape between them fails.
    """
    sizes = list(target)
    unknown = [n for n, dim in enumerate(sizes) if _is_fresh(dim)]
    if len(unknown) == 1 and sizes[unknown[0]] not in source:
        size = left_over(source, [dim for n, dim in enumerate(sizes) if n != unknown[0]])
        sizes[unknown[0]] = sizes[unknown[0]] if size is None else size
    return tuple(sizes)


def _is_fresh(dim: Dim) -> bool:
    return isinstance(dim, tuple) and len(dim) == 1 and dim[0][0][0].startswith("?")


def subtract(left: Dim, right: Dim) -> Dim:
    """The difference of two dimensions."""
    return add(left, multiply(-1, right))


def _terms(dim: Dim) -> Polynomial:
    return (((), dim),) if isinstance(dim, int) else dim


def _from_terms(terms: Iterable[tuple[tuple[str, ...], int]]) -> Dim:
    total: dict[tuple[str, ...], int] = {}
    for names, count in terms:
        total[names] = total.get(names, 0) + count
    kept = tuple(sorted((names, count) for names, count in total.items() if count))
    if len(kept) > _MAX_TERMS or any(
        len(names) > _MAX_DEGREE or abs(count) > _MAX_SIZE for names, count in kept
    ):
        msg = "a dimension grows without bounds"
        raise ValueError(msg)
    if not kept:
        return 0
    return kept[0][1] if len(kept) == 1 and not kept[0][0] else kept
