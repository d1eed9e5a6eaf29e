"""The search for numbers of tokens per layer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from optimizer.blocks import find_blocks
from optimizer.calibration import Calibration, input_specs
from optimizer.conformance.encoders import Encoder, build_encoder, encoder_feed
from optimizer.errors import CalibrationError
from optimizer.pass_base import Context
from optimizer.samples import load_samples
from optimizer.tokens.schedule import clipped, keeping, linear
from optimizer.tokens.search import Costs, Search
from passes.tome import Options, ToMe

COSTS = Costs(101, (400,) * 4, (800,) * 4, (20,) * 4)


def search(weights: Sequence[float]) -> Search:
    """Damage is a weighted sum of squares: what each layer costs is known."""

    def damage(removed: Sequence[int]) -> float:
        return float(sum(w * r**2 for w, r in zip(weights, removed, strict=True)))

    return Search(COSTS, lambda count: (count - 1) // 2, damage)


def test_costs_are_those_of_the_products() -> None:
    encoder = Encoder(patches=12)
    costs = Costs.of(find_blocks(build_encoder(encoder)).blocks, encoder.count)
    # 32 wide, 4 heads of 8, MLP of 24: written out for 13 tokens and 3 layers
    assert costs.total([0, 0, 0]) == 3 * (13 * 4 * 32 * 32 + 2 * 13 * 13 * 32 + 13 * 2 * 32 * 24)
    last = costs.total([0, 0, 0]) - costs.total([0, 0, 5])
    assert last == 5 * 2 * 32 * 24


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (9, 1, 1, 4), (1, 2, 3, 90)])
def test_a_schedule_is_no_dearer_and_no_worse_than_the_constant_one(
    weights: tuple[float, ...],
) -> None:
    found = search(weights)
    wanted = (10, 10, 10, 10)
    chosen = found.within_cost(wanted)
    assert COSTS.total(chosen) <= COSTS.total(wanted)
    assert found.measure(chosen) <= found.measure(wanted)
    assert found.fits(chosen)


def test_layers_that_hurt_most_give_least() -> None:
    chosen = search((1, 100, 1, 1)).within_cost((10, 10, 10, 10))
    assert chosen[1] < min(chosen[0], chosen[2])


@pytest.mark.parametrize("budget", [50.0, 1000.0, 1e9])
def test_a_budget_of_damage_is_kept_and_used(budget: float) -> None:
    found = search((1, 2, 1, 1))
    chosen = found.within_damage(budget)
    assert found.measure(chosen) <= budget
    assert sum(chosen) > 0
    cheaper = search((1, 2, 1, 1)).within_damage(budget / 10)
    assert COSTS.total(chosen) <= COSTS.total(cheaper)


def test_schedules() -> None:
    assert linear(8, -1, 5) == [16, 12, 8, 4, 0]
    assert linear(8, 0, 3) == [8, 8, 8]
    assert keeping(0.5, 100, 3) == [16, 17, 17]
    assert clipped([8, 8], 13, lambda n: (n - 1) // 2) == ([6, 3], [0, 1])


def test_the_pass_searches_on_samples() -> None:
    encoder = Encoder(patches=16)
    model = build_encoder(encoder)
    samples = load_samples(encoder_feed(encoder, batch=8), input_specs(model))
    context = Context(calibration=Calibration(samples))
    report = ToMe(Options(keep=0.5, search=True)).call(model.clone(), context)
    constant = ToMe(Options(keep=0.5)).call(model.clone(), context)
    costs = Costs.of(find_blocks(model).blocks, encoder.count)
    chosen, wanted = (x.details["towers"][0]["removed"] for x in (report, constant))
    assert costs.total(chosen) <= costs.total(wanted)
    calibration = context.calibration
    assert calibration is not None
    reference = calibration.reference(model)
    damages = []
    for removed in (chosen, wanted):
        copy = model.clone()
        ToMe(Options(r=tuple(removed))).call(copy, context)
        damages.append(calibration.drift(reference, copy).kl)
    assert damages[0] <= damages[1]


def test_a_budget_of_drift_is_kept() -> None:
    encoder = Encoder(patches=16)
    model = build_encoder(encoder)
    calibration = Calibration(load_samples(encoder_feed(encoder, batch=8), input_specs(model)))
    reference, made = calibration.reference(model), model.clone()
    report = ToMe(Options(drift=0.02)).call(made, Context(calibration=calibration))
    drift = calibration.drift(reference, made).kl
    assert drift is not None
    assert report.modified
    assert drift <= 0.02


def test_a_search_without_samples_is_refused() -> None:
    assert ToMe(Options(search=True)).needs_calibration()
    with pytest.raises(CalibrationError, match="add --calibration"):
        ToMe(Options(search=True)).call(build_encoder(), Context())
