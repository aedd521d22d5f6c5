"""The least a node asks: what its electricity costs, by what is known of it."""

from pathlib import Path

import msgspec
import pytest

from fallow.adapters import machine
from fallow.apps.lend_settings import Power
from fallow.apps.node.pricing import Pricing
from fallow.apps.settings import Settings
from fallow.model.measured import Choice, Measured, Point

CORES = machine.physical_cores()
POINT = Point(threads=1, prefill_tokens_per_s=200.0, decode_by_streams=((1, 50.0),))
FAST = Measured(
    work="text", choice=Choice(threads=1, slots=4, batch_tokens=128), prefill_tokens_per_s=200.0, decode_tokens_per_s=50.0,
    decode_by_streams=((1, 50.0),), points=(POINT,), at_ms=0,
)  # fmt: skip


def pricing(watts: float = 36.0, **measured: Measured) -> Pricing:
    return Pricing(Settings(data=Path(), power=Power(watts=watts)), measured)


def test_a_measured_model_costs_what_its_electricity_does() -> None:
    price = pricing(watts=36.0 * CORES, m=FAST).price("m", 0.25)
    # 36 W at 50 tokens a second are 0.72 J a token: 0.2 kWh, 0.05 USD a million
    assert price.output_micro_per_munit == pytest.approx(50_000, abs=1)
    assert price.prompt_micro_per_munit == pytest.approx(12_500, abs=1)


def test_an_unmeasured_one_costs_as_if_it_were_slow() -> None:
    known, unknown = pricing(m=FAST).price("m", 0.25), pricing().price("m", 0.25)
    assert unknown.output_micro_per_munit > known.output_micro_per_munit > 0
    assert unknown.prompt_micro_per_munit > known.prompt_micro_per_munit > 0


def test_it_follows_the_price_of_power() -> None:
    mine = pricing(m=FAST)
    assert mine.price("m", 0.0).output_micro_per_munit == 0
    assert mine.price("m", 0.5).output_micro_per_munit == pytest.approx(2 * mine.price("m", 0.25).output_micro_per_munit, abs=1)


def test_watts_are_the_owners_where_they_said_so() -> None:
    mine = pricing(watts=40.0)
    assert (mine.watts(CORES).value, mine.watts(CORES).method) == (40.0, "owner")
    assert mine.watts(CORES / 2).value == pytest.approx(20.0)
    assert mine.watts(10.0 * CORES).value == 40.0
    assert mine.watts(0.0).value == 0.0
    guessed = pricing(watts=0.0).watts(CORES)
    assert guessed.method == "modelled"
    assert guessed.value > 0
    assert msgspec.json.encode(guessed)
