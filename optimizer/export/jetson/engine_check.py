"""Runs an engine on the stored samples of a bundle and compares; needs libcudart and tensorrt.

Part of a Jetson bundle, beside ``build_engine.py``. Python 3.8, nothing but its own library.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import math
import struct
import zipfile
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

_TO_DEVICE, _TO_HOST = 1, 2
#: ONNX's name of a type -> (what TensorRT calls it, bytes, code of ``struct``).
TYPES = {
    "FLOAT": ("FLOAT", 4, "f"),
    "FLOAT16": ("HALF", 2, "e"),
    "BFLOAT16": ("BF16", 2, "H"),
    "INT64": ("INT64", 8, "q"),
    "INT32": ("INT32", 4, "i"),
    "INT8": ("INT8", 1, "b"),
    "UINT8": ("UINT8", 1, "B"),
    "BOOL": ("BOOL", 1, "?"),
}
#: Elements that are numbers of Python at a time: they take ten times the memory.
_PIECE = 1 << 16
_FLOATING = ("FLOAT", "FLOAT16", "BFLOAT16")


class CheckError(Exception):
    """The engine could not be run, or its outputs are wrong."""


class Difference(NamedTuple):
    """How far an output is from the stored one: the measure, and the most it may be."""

    output: str
    measure: str
    found: float
    allowed: float

    @property
    def too_large(self) -> bool:
        """Also where the measure is no number."""
        return not self.found <= self.allowed


class Stored(NamedTuple):
    """An array of the samples: little-endian bytes in C order."""

    shape: Tuple[int, ...]
    data: bytes


def read_samples(path: str) -> Dict[str, Stored]:
    """The arrays of an ``.npz`` file, by name.

    Raises:
        CheckError: It is none, or an array is not stored as the bundle stores it.
    """
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                found[name[: -len(".npy")]] = _read_array(archive.read(name))
    except (OSError, ValueError, KeyError, SyntaxError, struct.error, zipfile.BadZipFile) as error:
        raise CheckError(f"{path} cannot be read: {error}") from error
    return found


def _read_array(content: bytes) -> Stored:
    """The format of numpy's documentation (numpy.lib.format), versions 1 to 3."""
    if content[:6] != b"\x93NUMPY":
        raise ValueError("an array is not in numpy's format")
    width = 2 if content[6] == 1 else 4
    length = int.from_bytes(content[8 : 8 + width], "little")
    header = ast.literal_eval(content[8 + width : 8 + width + length].decode("latin1"))
    if header["fortran_order"] or header["descr"][0] == ">":
        raise ValueError("an array is not little-endian in C order")
    return Stored(tuple(header["shape"]), content[8 + width + length :])


def numbers(data: bytes, dtype: str) -> Sequence[float]:
    """The numbers of an array of ONNX's type ``dtype``."""
    _, width, code = TYPES[dtype]
    count = len(data) // width
    values = struct.unpack("<%d%s" % (count, code), data)
    if dtype == "BFLOAT16":  # the upper half of a float32
        words = struct.pack("<%dI" % count, *(value << 16 for value in values))
        return struct.unpack("<%df" % count, words)
    return values


def compare(name: str, dtype: str, found: bytes, expected: bytes, allowed: float) -> Difference:
    """Relative L2 error of floating numbers, number of differing elements of others.

    Args:
        name: Of the output.
        dtype: ONNX's name of its type.
        found: What the engine gave.
        expected: What was stored.
        allowed: Largest relative L2 error, 0.001 for 0.1 %.
    """
    if len(found) != len(expected):
        return Difference(name, "number of bytes", float(len(found)), float(-len(expected)))
    width, floating = TYPES[dtype][1], dtype in _FLOATING
    differing, special, size, error = 0, False, 0.0, 0.0
    for start in range(0, len(found), _PIECE * width):
        part = slice(start, start + _PIECE * width)
        pairs = list(zip(numbers(found[part], dtype), numbers(expected[part], dtype)))
        if not floating:
            differing += sum(a != b for a, b in pairs)
            continue
        finite = [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
        if len(finite) < len(pairs):
            special = special or any(map(_unlike, pairs))
        size += math.fsum(b * b for _, b in finite)
        error += math.fsum((a - b) * (a - b) for a, b in finite)
    if not floating:
        return Difference(name, "differing elements", differing, 0)
    if special:
        return Difference(name, "relative L2 error", math.nan, allowed)
    if size == 0:  # nothing to be relative to: zeros must be zeros
        return Difference(name, "L2 error", math.sqrt(error), 0)
    return Difference(name, "relative L2 error", math.sqrt(error / size), allowed)


def _unlike(pair: Tuple[float, float]) -> bool:
    """Whether one is infinite or no number, and the other is not the same."""
    one, other = pair
    if math.isfinite(one) and math.isfinite(other):
        return False
    return one != other and not (math.isnan(one) and math.isnan(other))


class Cuda:
    """The few functions of the CUDA runtime that a check needs.

    Raises:
        CheckError: No library is there, or a call failed.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._library: Any = None
        for name in names:
            with contextlib.suppress(OSError):
                self._library = ctypes.CDLL(name)
                break
        if self._library is None:
            raise CheckError("libcudart is not there (looked for {})".format(", ".join(names)))
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    def version(self) -> str:
        """Of the runtime: "12.6"."""
        number = ctypes.c_int()
        self._call("cudaRuntimeGetVersion", ctypes.byref(number))
        return "%d.%d" % (number.value // 1000, number.value % 1000 // 10)

    @contextlib.contextmanager
    def memory(self, size: int) -> Iterator[int]:
        """Memory of the device, until the end of the block."""
        pointer = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        try:
            yield pointer.value or 0
        finally:
            self._call("cudaFree", pointer)

    def upload(self, pointer: int, data: bytes) -> None:
        """Copy to the device."""
        self._copy(ctypes.c_void_p(pointer), data, len(data), _TO_DEVICE)

    def download(self, pointer: int, size: int) -> bytes:
        """Copy from the device, when all that was started is done."""
        self._call("cudaDeviceSynchronize")
        buffer = ctypes.create_string_buffer(max(size, 1))
        self._copy(buffer, ctypes.c_void_p(pointer), size, _TO_HOST)
        return buffer.raw[:size]

    def _copy(self, to: Any, data: Any, size: int, kind: int) -> None:
        if size:
            self._call("cudaMemcpy", to, data, ctypes.c_size_t(size), ctypes.c_int(kind))

    def _call(self, name: str, *words: Any) -> None:
        code = getattr(self._library, name)(*words)
        if code:
            text = self._library.cudaGetErrorString(code)
            raise CheckError("{}: {}".format(name, (text or b"").decode("utf-8", "replace")))


def run(trt: Any, engine: Any, cuda: Cuda, table: Any, stored: Any) -> Dict[str, bytes]:
    """Outputs of the engine for the stored inputs, by name.

    Args:
        trt: The module ``tensorrt``.
        engine: Deserialized.
        cuda: The runtime.
        table: "samples" of the manifest.
        stored: Of ``read_samples``.

    Raises:
        CheckError: The engine has other inputs or types, a size that depends on data, or failed.
    """
    context = engine.create_execution_context()
    if context is None:
        raise CheckError("no execution context could be made: not enough memory of the device")
    if table["profile"] and not context.set_optimization_profile_async(table["profile"], 0):
        raise CheckError("the engine has no profile %d" % table["profile"])
    with contextlib.ExitStack() as stack:
        kept: List[Any] = []
        for row in table["inputs"]:
            name, array = row["name"], stored["input." + row["name"]]
            _check_type(engine, row)
            if not context.set_input_shape(name, array.shape):
                raise CheckError(f"input '{name}': the engine does not take {array.shape}")
            if engine.get_tensor_location(name) == trt.TensorLocation.HOST:
                kept.append(ctypes.create_string_buffer(array.data, max(len(array.data), 1)))
                pointer = ctypes.addressof(kept[-1])
            else:
                pointer = stack.enter_context(cuda.memory(len(array.data)))
                cuda.upload(pointer, array.data)
            context.set_tensor_address(name, pointer)
        outputs = {}
        for row in table["outputs"]:
            _check_type(engine, row)
            shape = tuple(context.get_tensor_shape(row["name"]))
            if min(shape, default=1) < 0:
                raise CheckError("output '{}': its size depends on the data".format(row["name"]))
            size = TYPES[row["dtype"]][1]
            for length in shape:
                size *= length
            outputs[row["name"]] = (stack.enter_context(cuda.memory(size)), size)
            context.set_tensor_address(row["name"], outputs[row["name"]][0])
        if not context.execute_async_v3(0):
            raise CheckError("the engine failed; see its messages above")
        return {name: cuda.download(*place) for name, place in outputs.items()}


def _check_type(engine: Any, row: Any) -> None:
    found = str(engine.get_tensor_dtype(row["name"])).rpartition(".")[2].upper()
    if found != TYPES[row["dtype"]][0]:
        raise CheckError(
            "'{}' is {} in the engine, expected {}".format(row["name"], found, row["dtype"])
        )
