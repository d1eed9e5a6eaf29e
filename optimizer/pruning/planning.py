"""Decides all new weights, on a copy of the model whose inputs are watched.

One run of the dense model serves all layers. Sequential: block after block, each calibrated on the
model in which those before it are pruned already, as the public code of SparseGPT and Wanda does
it, at the cost of one run of all samples per block. What is held at a time is bounded by ``_HELD``:
where the statistics of all layers exceed it, the samples run once for each part of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.calibration import Calibration
from optimizer.half_weights import Widened
from optimizer.listener import Listener, Silent
from optimizer.nodes import operand
from optimizer.observers import ChannelSquareSum
from optimizer.pass_base import Skip
from optimizer.pruning import allocation
from optimizer.pruning.layers import Choice, Layer, find_layers
from optimizer.pruning.methods import SparseGpt, magnitude, relative_damage, wanda, zeroed
from optimizer.pruning.patterns import Pattern
from optimizer.pruning.statistics import SecondMoments
from optimizer.pruning.stored import PrunedWeight

logger = logging.getLogger(__name__)

Method = Literal["magnitude", "wanda", "sparsegpt"]

#: Bytes of second moments held at a time, but for one input that needs more by itself.
_HELD = 1 << 30
#: One in so many samples measures what each unit alone does to the model.
_SCREENED = 2


@dataclass(frozen=True)
class Settings:
    """How to prune; see the options of the pass."""

    method: Method
    pattern: Pattern
    by_damage: bool = False
    sequential: bool = False
    damping: float = 0.01
    block: int = 16


@dataclass(frozen=True)
class Pruned:
    """One layer, decided.

    Attributes:
        weight: What it becomes.
        share: Of zeros that it was to have.
        damage: ||X (W - V)||^2 / ||X W||^2 on the calibration data; of Wanda as if channels were
            uncorrelated, of magnitude as if they were all alike too.
        tokens: Rows it was decided on; 0 without data.
    """

    weight: PrunedWeight
    share: float
    damage: float
    tokens: int


def plan(
    model: ir.Model,
    choice: Choice,
    settings: Settings,
    calibration: Calibration | None,
    listener: Listener | None = None,
) -> tuple[list[Pruned], list[Skip]]:
    """Decide on a copy of ``model``, whose layers are named as those of the copy.

    ``calibration`` may only be None where all layers get the same share by magnitude.
    """
    return _Planner(model, choice, settings, calibration, listener or Silent()).run()


class _Planner:
    def __init__(
        self,
        model: ir.Model,
        choice: Choice,
        settings: Settings,
        calibration: Calibration | None,
        listener: Listener,
    ) -> None:
        self.model = model.clone()
        self.settings, self.calibration, self.listener = settings, calibration, listener
        self.layers, self.skipped = find_layers(self.model, choice, settings.pattern)
        self.shares: dict[str, float] = {}
        self.done: dict[str, Pruned] = {}

    def run(self) -> tuple[list[Pruned], list[Skip]]:
        self.layers = [layer for layer in self.layers if self._is_prunable(layer)]
        if self.settings.by_damage and self.layers:
            if self._sparse_enough():
                return [], self.skipped
            self._allocate()
        self.layers = [layer for layer in self.layers if self._is_dense(layer)]
        self.listener.stage("sparsify: pruning")
        for group in self._rounds():
            self._round(group)
            if self.settings.sequential:
                self._put(group)
        return [self.done[x.name] for x in self.layers if x.name in self.done], self.skipped

    def _put(self, group: Sequence[Layer]) -> None:
        for layer in group:
            if layer.name in self.done:
                self.done[layer.name].weight.put(self.model.graph, layer)

    # Which layers.

    def _is_prunable(self, layer: Layer) -> bool:
        if np.isfinite(_numbers(layer)).all():
            return True
        self.skipped.append(Skip(layer.name, "its weight is not finite"))
        return False

    def _is_dense(self, layer: Layer) -> bool:
        """Whether zeros are to be added."""
        pattern = self._pattern(layer)
        if not pattern.holds(_numbers(layer)):
            return True
        self.skipped.append(Skip(layer.name, f"it is {pattern} already"))
        return False

    def _sparse_enough(self) -> bool:
        """Whether the layers together have the zeros asked for, however they are shared out."""
        zeros = size = wanted = 0
        for layer in self.layers:
            weight = _numbers(layer)
            zeros, size = zeros + int((weight == 0).sum()), size + weight.size
            wanted += self.settings.pattern.zeros(len(weight)) * weight.shape[1]
        # Shares of single layers are rounded to whole weights of a column.
        rounding = sum(layer.shape[1] for layer in self.layers)
        if zeros < min(wanted, self.settings.pattern.share * size) - rounding:
            return False
        reason = f"its layers are {100 * zeros / size:.3g} % zeros already"
        self.skipped.append(Skip("model", reason))
        return True

    def _pattern(self, layer: Layer) -> Pattern:
        share = self.shares.get(layer.name, self.settings.pattern.share)
        return replace(self.settings.pattern, share=share)

    def _rounds(self) -> Iterator[list[Layer]]:
        """Layers that are calibrated in one run: a block's, or as many as memory allows."""
        groups: dict[object, list[Layer]] = {}
        for layer in self.layers:
            key: object = 0
            if self.settings.sequential and self.settings.method != "magnitude":
                key = ("block", layer.block) if layer.block is not None else _input(layer)
            groups.setdefault(key, []).append(layer)
        for group in groups.values():
            yield from self._bounded(group)

    def _bounded(self, group: list[Layer]) -> Iterator[list[Layer]]:
        """``group`` in parts whose statistics fit ``_HELD``."""
        part: list[Layer] = []
        inputs: set[ir.Value] = set()
        held = 0
        for layer in group:
            size = 4 * layer.shape[0] ** 2
            fresh = _input(layer) not in inputs
            if fresh and part and held + size > _HELD:
                yield part
                part, inputs, held = [], set(), 0
                fresh = True
            held += size if fresh else 0
            inputs.add(_input(layer))
            part.append(layer)
        yield part

    # One round.

    def _round(self, group: Sequence[Layer]) -> None:
        moments = self._observe(group)
        solvers: dict[ir.Value, SparseGpt] = {}
        for layer in group:
            seen = moments.get(_input(layer))
            reason = None if seen is None else _fault(*seen)
            if reason is not None:
                self.skipped.append(Skip(layer.name, reason))
                continue
            new, damage = self._prune(layer, None if seen is None else seen[0], solvers)
            self.done[layer.name] = Pruned(
                PrunedWeight.of(layer.name, new, changed=self.settings.method == "sparsegpt"),
                self._pattern(layer).share,
                damage,
                0 if seen is None else seen[1],
            )
            logger.debug("sparsify: %s, damage %.3g", layer.name, damage)
            self.listener.progress(len(self.done), len(self.layers))

    def _observe(self, group: Sequence[Layer]) -> dict[ir.Value, tuple[np.ndarray, int]]:
        """H or its diagonal, and the number of tokens, of each input."""
        if self.calibration is None or self.settings.method == "magnitude":
            return {}
        inputs = list(dict.fromkeys(_input(layer) for layer in group))
        if self.settings.method == "wanda":
            return self._energies(inputs)
        observers = [SecondMoments(value) for value in inputs]
        self.calibration.observe(self.model, observers)
        return {o.values[0]: (o.total, o.tokens) for o in observers}

    def _energies(self, inputs: Sequence[ir.Value]) -> dict[ir.Value, tuple[np.ndarray, int]]:
        assert self.calibration is not None  # noqa: S101 - who asks has data
        observers = [ChannelSquareSum(value) for value in inputs]
        self.calibration.observe(self.model, observers)
        nothing = np.zeros(0)
        return {o.values[0]: (o.total if o.tokens else nothing, o.tokens) for o in observers}

    def _prune(
        self, layer: Layer, moments: np.ndarray | None, solvers: dict[ir.Value, SparseGpt]
    ) -> tuple[np.ndarray, float]:
        """The new weight, in the type it is stored in, and the damage."""
        weight, pattern = _numbers(layer), self._pattern(layer)
        if moments is None:
            new = zeroed(weight, pattern.pruned(magnitude(weight)))
        elif self.settings.method == "wanda" or not moments.any():
            diagonal = moments if moments.ndim == 1 else np.diag(moments)
            new = zeroed(weight, pattern.pruned(wanda(weight, diagonal)))
        else:
            key = _input(layer)
            if key not in solvers:
                solvers.clear()  # layers of one input follow each other
                solvers[key] = SparseGpt(
                    moments, damping=self.settings.damping, block=self.settings.block
                )
            new = solvers[key].prune(weight, pattern).astype(_stored_type(layer))
        damage = relative_damage(weight, new, moments)
        return new.astype(_stored_type(layer), copy=False), damage

    # Shares by damage.

    def _allocate(self) -> None:
        assert self.calibration is not None  # noqa: S101 - the pass asks for it
        mean = self.settings.pattern.share
        units: dict[ir.Value, list[Layer]] = {}
        for layer in self.layers:
            units.setdefault(_input(layer), []).append(layer)
        self.listener.stage("sparsify: measuring what each layer alone does to the model")
        moments = self._energies(list(units))
        count = self.calibration.samples.count
        screen = self.calibration.limited(max(1, count // _SCREENED))
        reference = screen.reference(self.model)
        at = allocation.shares(mean)
        measured = []
        for number, (value, layers) in enumerate(units.items()):
            energy, tokens = moments[value]
            known = tokens > 0 and bool(np.isfinite(energy).all())
            scores = [wanda(_numbers(x), energy if known else np.ones(x.shape[0])) for x in layers]
            with _pruned_alone(self.model.graph, layers, scores, self.settings.pattern):
                drift = screen.drift(reference, self.model)
            damage = drift.relative_l2**2 if drift.kl is None else drift.kl
            size = sum(x.shape[0] * x.shape[1] for x in layers)
            measured.append(
                allocation.Unit(
                    size,
                    max(damage, 0.0),
                    allocation.energies(scores, at, balanced=self.settings.pattern.balanced),
                )
            )
            self.listener.progress(number + 1, len(units))
        for share, layers in zip(allocation.allocate(measured, mean), units.values(), strict=True):
            self.shares.update({layer.name: share for layer in layers})


@contextmanager
def _pruned_alone(
    graph: ir.Graph, layers: Sequence[Layer], scores: Sequence[np.ndarray], pattern: Pattern
) -> Iterator[None]:
    """These layers read pruned weights inside."""
    trials = []
    for layer, score in zip(layers, scores, strict=True):
        new = zeroed(_numbers(layer), pattern.pruned(score))
        trials.append(graphs.add_initializer(graph, f"{layer.name}_trial", new))
        layer.linear.matmul.replace_input_with(1, trials[-1])
    try:
        yield
    finally:
        for layer, value in zip(layers, trials, strict=True):
            layer.linear.matmul.replace_input_with(1, layer.linear.weight)
            del graph.initializers[str(value.name)]


def _input(layer: Layer) -> ir.Value:
    return operand(layer.linear.matmul)


def _numbers(layer: Layer) -> np.ndarray:
    tensor = graphs.constant(layer.linear.weight)
    assert tensor is not None  # noqa: S101 - a layer's weight is a constant
    array = tensor.numpy()
    graphs.release(tensor)
    return array


def _stored_type(layer: Layer) -> np.dtype:
    tensor = graphs.constant(layer.linear.weight)
    assert tensor is not None  # noqa: S101 - a layer's weight is a constant
    return (tensor.stored if isinstance(tensor, Widened) else tensor).dtype.numpy()


def _fault(moments: np.ndarray, tokens: int) -> str | None:
    if not tokens:
        return "no valid token of its input was seen"
    if not np.isfinite(moments).all():
        return "its input, or its square, is not finite on the calibration data"
    return None
