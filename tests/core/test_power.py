"""Watts and floor prices: whose figure counts, what a model says where nothing was measured, and what a million tokens cost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.core import power
from fallow.core.power import Machine, Watts
from fallow.model.measured import Choice, Measured, Point
from fallow.model.offer import Price

PROMISE = settings(max_examples=100)


def measured(prefill: float, decode: float) -> Measured:
    return Measured(
        work="text" if decode else "embeddings",
        choice=Choice(threads=1, slots=1, batch_tokens=128),
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s=decode,
        points=(Point(threads=1),),
        at_ms=1,
    )


@pytest.mark.parametrize(
    ("cores", "has_battery", "cpu", "then"),
    [
        pytest.param(4, True, "", "laptop", id="a battery"),
        pytest.param(64, True, "AMD EPYC 7B13", "laptop", id="a battery says more than a name"),
        pytest.param(8, False, "AMD Ryzen 7 5700X 8-Core Processor", "desktop", id="few cores"),
        pytest.param(16, False, "", "desktop", id="sixteen cores"),
        pytest.param(17, False, "", "server", id="more than sixteen"),
        pytest.param(2, False, "AMD EPYC", "server", id="a rented part of a server"),
        pytest.param(4, False, "Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz", "server", id="another one"),
        pytest.param(8, False, "Neoverse-N1", "server", id="an ARM server"),
    ],
)
def test_machine_class(cores: int, has_battery: bool, cpu: str, then: Machine) -> None:
    assert power.machine_class(cores=cores, has_battery=has_battery, cpu=cpu) == then


def test_the_owner_knows_best_then_the_meter_then_the_model() -> None:
    def of(owner: float, meter: float | None) -> Watts:
        return power.watts_of(busy=2, cores=8, machine="desktop", owner_watts=owner, measured_watts=meter)

    assert of(80.0, 12.0) == Watts(value=20.0, method="owner")
    assert of(0.0, 19.0).method == "rapl"
    assert of(0.0, 19.0).value == pytest.approx(21.0)
    assert of(0.0, None).method == "modelled"
    assert of(0.0, 0.0).method == "modelled", "a meter that saw nothing saw nothing"


@pytest.mark.parametrize(
    ("machine", "cores", "low", "high"),
    [
        pytest.param("server", 4, 15, 40, id="8 vCPUs of an EPYC: about 20 W in market.md"),
        pytest.param("desktop", 6, 50, 90, id="a desktop: about 65 W in market.md"),
        pytest.param("laptop", 4, 10, 25, id="a laptop"),
        pytest.param("server", 64, 250, 650, id="a whole server"),
    ],
)
def test_the_model_is_near_what_is_published(machine: Machine, cores: int, low: float, high: float) -> None:
    assert low <= power.watts_of(busy=cores, cores=cores, machine=machine).value <= high


@PROMISE
@given(cores=st.integers(1, 256), busy=st.integers(0, 256), machine=st.sampled_from(["server", "desktop", "laptop"]))
def test_more_work_never_draws_less(cores: int, busy: int, machine: Machine) -> None:
    def of(busy: int) -> float:
        return power.watts_of(busy=busy, cores=cores, machine=machine).value

    assert of(0) == 0
    assert 0 <= of(busy) <= of(busy + 1) <= of(cores)


def test_the_published_example() -> None:
    """market.md §0 (e): 20 W, 7.8 tokens a second, 0.15 USD per kWh are about 0.10 USD per million tokens; a desktop's 0.27."""
    server = power.floor_price(Watts(value=20.0, method="owner"), usd_per_kwh=0.15, tokens_per_s=7.8)
    desktop = power.floor_price(Watts(value=65.0, method="owner"), usd_per_kwh=0.15, tokens_per_s=10.0)
    assert server == 106_838
    assert desktop == 270_834


@PROMISE
@given(watts=st.floats(0, 1e4), usd=st.floats(0, 10), speed=st.floats(1e-2, 1e6))
def test_the_floor_covers_the_cost_and_no_more(watts: float, usd: float, speed: float) -> None:
    micro = power.floor_price(Watts(value=watts, method="owner"), usd_per_kwh=usd, tokens_per_s=speed)
    cost = watts / speed * 1e6 / 3.6e6 * usd * 1e6
    if micro < power.PRICE_MAX:
        assert cost * (1 - 1e-9) <= micro <= cost * (1 + 1e-9) + 1
    else:
        assert cost >= power.PRICE_MAX * (1 - 1e-9)


def test_the_price_of_a_model() -> None:
    watts = Watts(value=36.0, method="modelled")
    text = power.price(measured(100.0, 10.0), watts, usd_per_kwh=0.30)
    assert (text.prompt_micro_per_munit, text.cached_prompt_micro_per_munit, text.output_micro_per_munit) == (30_000, 0, 300_000)
    vectors = power.price(measured(100.0, 0.0), watts, usd_per_kwh=0.30)
    assert (vectors.prompt_micro_per_munit, vectors.output_micro_per_munit) == (30_000, 0), "no output, nothing to sell"
    assert power.price(measured(100.0, 10.0), watts, usd_per_kwh=0.0) == Price()
