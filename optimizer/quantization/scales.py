"""Decides how the input of a site is scaled and shifted before it is rounded.

With x [K] one token of the input, W [K, N] all weights that read it, and q the largest code:

    y = (x - z) / s,   W' = diag(s) W,   x W = y W' + z W
    static:     codes = round(y / t), one number t for all tokens
    per token:  codes = round((y / r - c) * n), r one number for each token

z is the middle of each channel's range (symmetrization, OutlierTune, arXiv 2406.18832), and
s = max|x - z|^alpha / max|W|^(1 - alpha) (SmoothQuant, arXiv 2211.10438, eq. 4). OutlierTune is
alpha = 1, where y spans the same range in every channel, and t is made 1 by scaling s; SmoothQuant
is alpha = 0.5 without z; no s at all is plain per-tensor or per-token quantization.

Alternatives are compared by the error that rounding is expected to add to x W, from the model that
rounding errors are independent and uniform over a step (variance step^2 / 12):

    activations:  mean over tokens of (step of y)^2 / 12 * sum_k s_k^2 sum_n W_kn^2
    weights:      sum_n (step of column n of W')^2 / 12 * sum_k mean over tokens of y_k^2
    saturation:   sum_k s_k^2 sum_n W_kn^2 * mean over tokens of max(|y_k| - q t, 0)^2

Saturation (static only) is that of one half of the calibration data under the ranges of the other,
and decides how much wider than seen the ranges are made.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from optimizer.quantization.sites import Kind, Site
from optimizer.quantization.statistics import Half, InputStatistics
from optimizer.quantization.weights import top_code

#: A channel's range counts as at least this part of the largest number of all channels: one that
#: was silent or constant during calibration must not saturate at the first number it shows.
CHANNEL_FLOOR = 1e-3
#: A token's range counts as at least this part of the widest seen, so that no row is divided by 0.
#: Rounded down to a power of 16: compilers write such numbers into their kernels, and layers with
#: equal ones share a kernel.
TOKEN_FLOOR = 1e-5
#: A centre counts as zero below this part of the channel's range (float32 noise).
CENTRE_NOISE = 1e-6
#: Compensated rounding leaves about this part of the error of rounding to nearest (measured on
#: trained encoders and decoders: 0.3 to 0.6).
_COMPENSATED = 0.4
#: Expected error must fall below this part before an extra elementwise step is spent.
_WORTH_A_STEP = 0.9
_WORTH_A_RANGE = 0.75
_ALPHAS = tuple(i / 10 for i in range(11))
#: Ranges of constant scales, relative to what was seen.
_MARGINS = (1.0, 1.05, 1.1, 1.2, 1.3, 1.5)
_FLOORS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)


class Scheme(enum.Enum):
    """How codes are made of y.

    STATIC: one constant step for all tokens.
    TOKEN: r = max |y|, symmetric.
    TOKEN_LOW: y has a proven lower bound; r = max y, and c a constant number of whole steps.
    TOKEN_RANGE: r and c from the smallest and largest number of the token.
    """

    STATIC = "static"
    TOKEN = "per-token"
    TOKEN_LOW = "per-token, bounded below"
    TOKEN_RANGE = "per-token, both ends"


@dataclass(frozen=True)
class Policy:
    """What the user asked for; see the options of the pass."""

    bits: int = 8
    alpha: float | Literal["auto", "off"] = "auto"
    shift: bool | Literal["auto"] = "auto"
    static: bool = True
    asymmetric: bool = True
    compensated: bool = True
    margin: bool = True


@dataclass(frozen=True)
class Scaling:
    """The choice for one site, in the symbols of the module.

    Attributes:
        shift: z [K] float64; None = 0.
        scale: s [K] float64; None = 1.
        step: t (static) or 1 / n (per token).
        offset: c in steps, a whole number.
        floor: r is at least this.
        alpha: What ``scale`` was made with.
        margin: Range that codes cover, relative to the range seen (static).
        error: Expected squared error of x W per token, relative to its mean square.
    """

    scheme: Scheme
    shift: np.ndarray | None
    scale: np.ndarray | None
    step: float
    offset: int = 0
    floor: float = 0.0
    alpha: float | None = None
    margin: float = 1.0
    error: float = 0.0

    def apply(self, x: np.ndarray) -> np.ndarray:
        """Return y of rows [..., K], in the precision of x."""
        y = x if self.shift is None else x - self.shift.astype(x.dtype)
        return y if self.scale is None else y * (1 / self.scale).astype(x.dtype)


def choose(
    site: Site, stats: InputStatistics, weights: Sequence[np.ndarray], policy: Policy
) -> Scaling:
    """The scaling of least expected error among those that ``policy`` and the site allow."""
    search = _Search(site, stats, weights, policy)
    plain = search.best(None)
    if policy.shift is False or not search.may_shift:
        return plain
    centre = centres(stats)
    if centre is None:
        return plain
    shifted = search.best(centre)
    if policy.shift is True:
        return shifted
    free = site.norm is not None and site.norm.bias_slot is not None
    return shifted if shifted.error < (1.0 if free else _WORTH_A_STEP) * plain.error else plain


def token_floor(top: float) -> float:
    """The least range of a token where ``top`` is the widest seen; 0 for 0."""
    if top <= 0:
        return 0.0
    return float(16.0 ** math.floor(math.log2(TOKEN_FLOOR * top) / 4))


def centres(stats: InputStatistics | Half) -> np.ndarray | None:
    """z: middle of every channel's range, None where all are 0."""
    centre = (stats.maximum + stats.minimum) / 2
    centre[np.abs(centre) <= CENTRE_NOISE * (stats.maximum - stats.minimum) / 2] = 0.0
    return centre if centre.any() else None


def _reach(low: np.ndarray, high: np.ndarray, shift: np.ndarray | None) -> np.ndarray:
    """Give every channel max |x - z|, at least a floor above 0."""
    top = float(np.maximum(np.abs(low), np.abs(high)).max(initial=0.0)) or 1.0
    if shift is not None:
        low, high = low - shift, high - shift
    result: np.ndarray = np.maximum(np.maximum(np.abs(low), np.abs(high)), CHANNEL_FLOOR * top)
    return result


class _Search:
    """Tries shifts and exponents on one site."""

    def __init__(
        self,
        site: Site,
        stats: InputStatistics,
        weights: Sequence[np.ndarray],
        policy: Policy,
    ) -> None:
        self.site, self.stats, self.weights, self.policy = site, stats, weights, policy
        self.q = top_code(policy.bits)
        self.rows = stats.rows
        self.row_energy = sum(np.einsum("kn,kn->k", w, w, dtype=np.float64) for w in weights)
        largest = np.max([np.abs(w).max(axis=1) for w in weights], axis=0)
        self.largest = np.maximum(largest.astype(np.float64), 1e-5)
        signal = sum(float(np.square(self.rows @ w).mean(axis=0).sum()) for w in weights)
        self.signal = max(signal, 1e-30)

    @property
    def may_shift(self) -> bool:
        """A shift needs a norm before the site, or a user who insists on static everywhere."""
        static = self.policy.static and self.policy.shift is True
        return self.site.kind is Kind.NORM or static

    def alphas(self) -> tuple[float | None, ...]:
        """Exponents to try; None is no scale.

        Channels are scaled after a norm, and where the layer before takes the scales for free.
        Elsewhere only on demand: static ranges of single channels of attention outputs and
        activations do not carry over to unseen data (measured on trained models: 8 to 100 times
        the error of one scale per token).
        """
        alpha = self.policy.alpha
        after_norm = self.site.kind is Kind.NORM
        if alpha == "off":
            return (None,)
        if alpha == "auto":
            free = self.site.source is not None and not self.policy.static
            return (None, *_ALPHAS) if after_norm or free else (None,)
        possible = after_norm or self.policy.static or self.site.source is not None
        return (float(alpha),) if possible else (None,)

    def best(self, shift: np.ndarray | None) -> Scaling:
        """The best exponent for one shift."""
        found = [self.scaling(shift, alpha) for alpha in self.alphas()]
        return min(found, key=lambda scaling: scaling.error)

    def scaling(self, shift: np.ndarray | None, alpha: float | None) -> Scaling:
        """Everything that follows from a shift and an exponent."""
        reach = _reach(self.stats.minimum, self.stats.maximum, shift)
        top = float(reach.max())
        scale = self.scale(reach, alpha)
        if not self.policy.static:
            if scale is not None:
                scale *= float((reach / scale).max()) / top
            base = Scaling(Scheme.TOKEN, shift, scale, 1.0, alpha=alpha)
            return self.per_token(base, base.apply(self.rows), top)
        margin, lost = self.margin(shift, alpha, reach)
        step = top * margin / self.q
        if scale is not None:
            scale *= float((reach / scale).max()) * margin / self.q
            step = 1.0
        base = Scaling(Scheme.STATIC, shift, scale, step, alpha=alpha, margin=margin)
        return replace(base, error=self.error(base, step**2) + lost)

    def scale(self, reach: np.ndarray, alpha: float | None) -> np.ndarray | None:
        """Give s up to a common factor."""
        if alpha is None:
            return None
        result: np.ndarray = reach**alpha / self.largest ** (1 - alpha)
        return result

    def margin(
        self, shift: np.ndarray | None, alpha: float | None, reach: np.ndarray
    ) -> tuple[float, float]:
        """The margin of least rounding and saturation error, and the latter's relative energy."""
        if not self.policy.margin:
            return 1.0, 0.0
        lost = np.zeros(len(_MARGINS))
        for half, other in zip(self.stats.halves, self.stats.halves[::-1], strict=True):
            if half.tokens and len(other.rows):
                centre = None if shift is None else centres(half)
                known = _reach(half.minimum, half.maximum, centre)
                lost += self.saturation(known, alpha, centre, other.rows) / 2
        scale = self.scale(reach, alpha)
        s = np.ones_like(reach) if scale is None else scale
        step = float((reach / s).max()) / self.q
        rounding = step**2 / 12 * float((s**2 * self.row_energy).sum())
        total = [rounding * m**2 + energy for m, energy in zip(_MARGINS, lost, strict=True)]
        best = total.index(min(total))
        return _MARGINS[best], float(lost[best]) / self.signal

    def saturation(
        self, known: np.ndarray, alpha: float | None, shift: np.ndarray | None, rows: np.ndarray
    ) -> np.ndarray:
        """Energy per token that rows lose in ranges known from others, for every margin."""
        s = self.scale(known, alpha)
        gain = np.ones_like(known) if s is None else s
        y = np.abs(Scaling(Scheme.STATIC, shift, s, 1.0).apply(rows))
        limit = (known / gain).max().astype(rows.dtype)
        energy = gain**2 * self.row_energy
        beyond = [
            np.square(np.maximum(y - np.float32(m) * limit, 0)).mean(axis=0) for m in _MARGINS
        ]
        return np.array([float(part @ energy) for part in beyond])

    def per_token(self, base: Scaling, y: np.ndarray, top: float) -> Scaling:
        """Choose among the schemes with one scale per token."""
        high, low = y.max(axis=1), y.min(axis=1)
        bound = self.site.lower
        if bound is not None and base.scale is None and base.shift is None:
            scheme = self.bounded(base, high, -bound, top)
            if self.policy.asymmetric:
                return scheme
        reach = np.maximum(high, -low)
        floor = token_floor(top)
        result = replace(base, step=1 / self.q, floor=floor)
        energy = float(np.square(reach / self.q).mean())
        if self.policy.asymmetric and self.site.kind is Kind.MLP:
            both = float(np.square((high - low) / 2 / self.q).mean())
            if both < _WORTH_A_RANGE * energy:
                result, energy = replace(result, scheme=Scheme.TOKEN_RANGE), both
        return replace(result, error=self.error(result, energy))

    def bounded(self, base: Scaling, high: np.ndarray, depth: float, top: float) -> Scaling:
        """Scheme for tokens never below ``-depth``: r = max(high, floor), y / r in [-depth/r, 1].

        n = floor(2 q / (1 + depth / floor)) steps to 1 leave room for all below zero; the code of 1
        is q, so c = n - q steps. A small floor wastes codes below zero, a large one wastes them on
        tokens of small range.
        """
        if depth <= 0:
            options = [(token_floor(top), 2 * self.q)]
        else:
            options = [(depth * f, math.floor(2 * self.q / (1 + 1 / f))) for f in _FLOORS]
        energies = [float(np.square(np.maximum(high, f) / n).mean()) for f, n in options]
        energy = min(energies)
        floor, levels = options[energies.index(energy)]
        scheme = replace(
            base, scheme=Scheme.TOKEN_LOW, step=1 / levels, offset=levels - self.q, floor=floor
        )
        return replace(scheme, error=self.error(scheme, energy))

    def error(self, scaling: Scaling, step_energy: float) -> float:
        """Expected squared error of x W, relative (see the module)."""
        y = scaling.apply(self.rows)
        s = np.ones(len(self.largest)) if scaling.scale is None else scaling.scale
        activations = step_energy / 12 * float((s**2 * self.row_energy).sum())
        columns = 0.0
        for weight in self.weights:
            top = np.abs(weight if scaling.scale is None else weight * s[:, None].astype("f"))
            columns += float(np.square(top.max(axis=0) / self.q, dtype=np.float64).sum())
        rounding = columns / 12 * float(np.square(y).mean(axis=0).sum())
        if self.policy.compensated:
            rounding *= _COMPENSATED
        return (activations + rounding) / self.signal
