"""Generates with a KV cache in ONNX Runtime: prefill once, then one token at a time.

Both forms of the cache are driven the same way. "append" feeds each step the present of the last
one; "in-place" binds one buffer per cache as input and output, so that nothing is copied.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optimizer.errors import CalibrationError, ModelError, UnsupportedError
from optimizer.runners.ort import OrtRunner, import_onnxruntime
from optimizer.targets import KV_CACHE_KEY

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64,
           "tensor(int32)": np.int32}  # fmt: skip


class DecodeSession:
    """One sequence per batch row, with its cache.

    Rows may have different lengths if they are padded on the right.

    Attributes:
        form: "append" or "in-place".
        lengths: [B] tokens of each row so far.
    """

    def __init__(
        self,
        model: ir.Model | str | Path,
        *,
        max_length: int = 1024,
        threads: int = 1,
        optimize: bool = True,
    ) -> None:
        """Create the session.

        Args:
            model: With a KV cache: inputs "past...", outputs "present...", as many of both.
            max_length: Room of the buffers of an in-place cache, in tokens.
            threads: Threads within an operator.
            optimize: Let ONNX Runtime optimize the graph.

        Raises:
            ModelError: The model has no KV cache.
            UnsupportedError: The cache is of a type that numpy does not have.
        """
        runner = OrtRunner(model, threads=threads, optimize=optimize, rounding=False)
        self._session = runner.session
        if isinstance(model, ir.Model):
            facts = model.metadata_props.get(KV_CACHE_KEY)
        else:
            facts = self._session.get_modelmeta().custom_metadata_map.get(KV_CACHE_KEY)
        self.form: str = "append" if facts is None else json.loads(facts)["form"]
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._pairs = self._find_pairs(facts)
        for name in self._pairs:
            if self._inputs[name].type not in _DTYPES:
                msg = (
                    f"the cache '{name}' is {self._inputs[name].type}, which ONNX Runtime does not "
                    "hand over to Python; write the model with its cache in float32 or float16"
                )
                raise UnsupportedError(msg)
        self._logits = next(name for name in self._outputs if name not in self._pairs.values())
        self._room = max_length
        self._cache: dict[str, Any] = {}
        self._mask = np.zeros((0, 0), np.int64)
        self.lengths = np.zeros(0, np.int64)

    def _find_pairs(self, facts: str | None) -> dict[str, str]:
        """Names of past inputs, each with its present output."""
        if facts is not None:
            return dict(json.loads(facts)["buffers"])
        pasts = [name for name in self._inputs if name.startswith("past")]
        presents = [name for name in self._outputs if name.startswith("present")]
        if not pasts or len(pasts) != len(presents):
            msg = (
                f"the model has {len(pasts)} inputs 'past...' and {len(presents)} outputs "
                "'present...'; generation with a cache needs as many of both"
            )
            raise ModelError(msg)
        return dict(zip(pasts, presents, strict=True))

    @property
    def total(self) -> int:
        """Columns of the attention mask so far: tokens and padding."""
        return int(self._mask.shape[1])

    def prefill(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Start anew with the prompts ``ids`` [B, S]; ``mask`` [B, S] marks tokens with 1.

        Returns:
            Logits [B, S, V].

        Raises:
            CalibrationError: The padding is not on the right, or the prompt is too long.
        """
        ids = np.asarray(ids, np.int64)
        mask = np.ones_like(ids) if mask is None else np.asarray(mask, np.int64)
        if np.any(np.diff(mask, axis=1) > 0):
            raise CalibrationError("prompts of different length must be padded on the right")
        self._mask = mask
        self.lengths = np.zeros(len(ids), np.int64)
        self._cache = self._empty_cache(len(ids))
        positions = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
        logits = self._run(ids, positions)
        self.lengths = mask.sum(axis=1)
        return logits

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Add one token to every row, ``ids`` [B] or [B, 1]; returns logits [B, V]."""
        ids = np.asarray(ids, np.int64).reshape(-1, 1)
        self._mask = np.concatenate([self._mask, np.ones_like(ids)], axis=1)
        logits = self._run(ids, self.lengths[:, None])
        self.lengths = self.lengths + 1
        result: np.ndarray = logits[:, -1]
        return result

    def cache(self) -> dict[str, np.ndarray]:
        """The cache by name of the present output, [B, Hkv, T, c]."""
        arrays = {self._pairs[name]: value.numpy() for name, value in self._cache.items()}
        return {name: array[:, :, : self.total] for name, array in arrays.items()}

    def _empty_cache(self, batch: int) -> dict[str, Any]:
        ort = import_onnxruntime()
        length = self._room if self.form == "in-place" else 0
        cache = {}
        for name in self._pairs:
            heads, size = self._inputs[name].shape[1], self._inputs[name].shape[3]
            zeros = np.zeros((batch, heads, length, size), _DTYPES[self._inputs[name].type])
            cache[name] = ort.OrtValue.ortvalue_from_numpy(zeros)
        return cache

    def _run(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        in_place = self.form == "in-place"
        if in_place and self.total > self._room:
            msg = f"{self.total} tokens do not fit into buffers of {self._room}; raise max_length"
            raise CalibrationError(msg)
        binding = self._session.io_binding()
        known = {"input_ids": ids, "attention_mask": self._mask, "position_ids": positions}
        for name, value in self._inputs.items():
            if name in self._cache:
                binding.bind_ortvalue_input(name, self._cache[name])
            else:
                array = known[name].astype(_DTYPES[value.type])
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
        buffers = {self._pairs[name]: value for name, value in self._cache.items()}
        for name in self._outputs:
            if in_place and name in buffers:
                binding.bind_ortvalue_output(name, buffers[name])
            else:
                binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        results = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        if not in_place:
            self._cache = {name: results[self._pairs[name]] for name in self._pairs}
        logits: np.ndarray = results[self._logits].numpy()
        return logits
