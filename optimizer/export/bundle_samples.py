"""Stored inputs and outputs of a bundle, and how far a device's results may be from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.errors import CalibrationError, OptionError
from optimizer.inputs import listed

#: Of one optimization profile: input -> (smallest, usual, largest shape).
Profile: TypeAlias = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]

#: Relative rounding error of one operation, half of the distance of neighbouring numbers. float32
#: counts as TF32, which TensorRT uses for float32 products unless told otherwise; int8 is half a
#: step of 1/127 of the range.
_ROUNDING = {"FLOAT": 2.0**-11, "FLOAT16": 2.0**-11, "BFLOAT16": 2.0**-8, "INT8": 1 / 254}
#: Rounding errors that are independent stay below this many standard deviations.
_DEVIATIONS = 4.0


def check_profiles(model: ir.Model, profiles: Sequence[Profile]) -> None:
    """Compare profiles with the inputs of the model.

    Raises:
        OptionError: A dynamic input without a profile, an unknown name, ranks or fixed sizes that
            differ, min <= opt <= max violated, or one symbolic size with two values.
    """
    inputs = {value.name or "": value for value in model.graph.inputs}
    dynamic = {name for name, value in inputs.items() if not _fixed(value)}
    if dynamic and not profiles:
        raise OptionError(
            f"--shapes: none were given, but {listed(sorted(dynamic))} have sizes that vary; give "
            "min, opt and max: --shapes NAME:1x128,8x128,32x512"
        )
    for number, profile in enumerate(profiles):
        where = f"--shapes: profile {number}"
        if unknown := sorted(set(profile) - set(inputs)):
            raise OptionError(f"{where}: the model has no input '{unknown[0]}'; {listed(inputs)}")
        if missing := sorted(dynamic - set(profile)):
            raise OptionError(f"{where}: gives no shapes of '{missing[0]}', which vary")
        for reason in _contradictions(inputs, profile):
            raise OptionError(f"{where}: {reason}")


def _fixed(value: ir.Value) -> bool:
    return value.shape is not None and all(isinstance(size, int) for size in value.shape)


def _contradictions(inputs: Mapping[str, ir.Value], profile: Profile) -> list[str]:
    found: list[str] = []
    named: dict[tuple[str, int], tuple[int, str]] = {}
    for name, shapes in profile.items():
        declared = inputs[name].shape
        for kind, shape in zip(("min", "opt", "max"), shapes, strict=True):
            if declared is None or len(shape) != len(declared):
                found.append(f"'{name}' has the shape {declared}, found {list(shape)} as {kind}")
        if found:
            return found
        low, usual, high = shapes
        if any(not 0 <= a <= b <= c for a, b, c in zip(low, usual, high, strict=True)):
            found.append(f"'{name}': expected min <= opt <= max, found {low}, {usual}, {high}")
        for axis, size in enumerate(declared or ()):
            for which, shape in enumerate(shapes):
                if isinstance(size, int):
                    if shape[axis] != size:
                        found.append(f"axis {axis} of '{name}' is {size}, found {shape[axis]}")
                elif size.value is not None:
                    other = named.setdefault((str(size.value), which), (shape[axis], name))
                    if other[0] != shape[axis]:
                        found.append(
                            f"'{size.value}' is {other[0]} in '{other[1]}' and {shape[axis]} in "
                            f"'{name}'"
                        )
    return found


def describe_samples(
    model: ir.Model,
    profiles: Sequence[Profile],
    samples: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What is stored, and what the manifest says of it.

    Returns:
        Arrays by "input.NAME" and "output.NAME" (bfloat16 as its bits, uint16), and a table:
        "inputs" and "outputs" with "name" and "dtype" of each, "profile" whose range holds the
        inputs, "tolerance" of the relative L2 error of floating outputs (others must be equal).

    Raises:
        CalibrationError: Names, types or shapes are not the model's, or are in no profile.
    """
    stored: dict[str, np.ndarray] = {}
    table: dict[str, Any] = {"tolerance": tolerance(model)}
    for kind, values, arrays in (
        ("input", model.graph.inputs, samples),
        ("output", model.graph.outputs, expected),
    ):
        names = [value.name or "" for value in values]
        if set(names) != set(arrays):
            raise CalibrationError(
                f"stored samples: found the {kind}s {listed(sorted(arrays))}, expected "
                f"{listed(sorted(names))}"
            )
        rows = []
        for value, name in zip(values, names, strict=True):
            array = np.ascontiguousarray(arrays[name])
            found = ir.DataType.from_numpy(array.dtype)
            fits = value.shape is None or (
                len(value.shape) == array.ndim
                and all(
                    size in (length, None) or not isinstance(size, int)
                    for size, length in zip(value.shape, array.shape, strict=True)
                )
            )
            if found != value.dtype or not fits:
                raise CalibrationError(
                    f"stored samples: {kind} '{name}' is {found.name}{list(array.shape)}, expected "
                    f"{value.dtype.name if value.dtype else '?'}{value.shape}"
                )
            bits = array.view(np.uint16) if found is ir.DataType.BFLOAT16 else array
            stored[f"{kind}.{name}"] = bits
            rows.append({"name": name, "dtype": found.name, "shape": list(array.shape)})
        table[f"{kind}s"] = rows
    table["profile"] = _profile_of(profiles, samples)
    return stored, table


def _profile_of(profiles: Sequence[Profile], samples: Mapping[str, np.ndarray]) -> int:
    for number, profile in enumerate(profiles):
        if all(
            all(a <= size <= b for a, size, b in zip(low, samples[name].shape, high, strict=True))
            for name, (low, _, high) in profile.items()
        ):
            return number
    if not profiles:
        return 0
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in samples.items())
    raise CalibrationError(
        f"stored samples: {shapes} are in the range of no profile; give samples of such shapes, or "
        "--shapes that hold them"
    )


def tolerance(model: ir.Model) -> float:
    """Largest relative L2 error of an output that rounding explains: 4 sqrt(n) u.

    n is the number of operations on the longest path that compute floating numbers, u the largest
    rounding error of the types they compute in: errors of mean zero grow with the square root
    (Higham & Mary 2019, "A new approach to probabilistic rounding error analysis", theorem 2.4,
    gamma_n(lambda) = lambda sqrt(n) u to first order, lambda = 4). Products accumulate in float32
    or int32 and count as one. It separates a right engine from a wrong one, and is no bound for
    models that amplify errors.

    Returns:
        Between u and 0.5.
    """
    depth: dict[ir.Value, int] = {}
    rounding = _ROUNDING["FLOAT"]
    for node in model.graph:
        longest = max(
            (depth.get(value, 0) for value in node.inputs if value is not None), default=0
        )
        if graphs.const(node.outputs[0]) is not None and node.op_type == "Constant":
            continue
        kinds = {value.dtype.name for value in node.outputs if value.dtype is not None}
        rounding = max([rounding, *(_ROUNDING[kind] for kind in kinds & set(_ROUNDING))])
        step = int(bool(kinds & set(_ROUNDING)))
        for value in node.outputs:
            depth[value] = longest + step
    steps = max(depth.values(), default=1)
    return min(0.5, _DEVIATIONS * math.sqrt(max(steps, 1)) * rounding)
