"""What a call needs: the tiers' targets, each contradiction, and that no wish goes beyond the key."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.core.needs import FLEX_DEADLINE_MS, NAMED_MAX, Asked, country_of, micro, needs_of
from fallow.model.errors import Failure
from fallow.model.ids import OrgId
from fallow.model.needs import Isolation, Needs, Policy

NOW = 1_700_000_000_000
OWN = frozenset({"own"})
PROMISE = settings(max_examples=500)
RANK: dict[Isolation | None, int] = {None: 0, "none": 0, "landlock": 1, "bwrap": 2}


def places(*names: str) -> frozenset[str]:
    return frozenset(names)


def needs(policy: Policy | None = None, **wishes: Any) -> Needs:
    found = needs_of(Asked(model="m", **wishes), policy or Policy(), now_ms=NOW)
    assert isinstance(found, Needs), found
    return found


def failure(policy: Policy | None = None, **wishes: Any) -> Failure:
    found = needs_of(Asked(model="m", **wishes), policy or Policy(), now_ms=NOW)
    assert isinstance(found, Failure), found
    return found


@pytest.mark.parametrize(
    ("wishes", "first_ms", "each_ms", "deadline_ms"),
    [
        ({}, 10_000, 500, None),
        ({"prompt_tokens": 100}, 11_000, 500, None),
        ({"first_token_ms": 7}, 7, 500, None),
        ({"per_token_ms": 7, "prompt_tokens": 1}, 10_010, 7, None),
        ({"deadline_ms": 5_000}, None, None, 5_000),
        ({"deadline_ms": 5_000, "first_token_ms": 5_000}, 5_000, 500, 5_000),
        ({"deadline_ms": 50_000, "per_token_ms": 7}, 10_000, 7, 50_000),
        ({"deadline_ms": 50_000, "per_token_ms": 7, "first_token_ms": 8}, 8, 7, 50_000),
        ({"service_tier": "priority"}, 3_000, 150, None),
        ({"service_tier": "priority", "prompt_tokens": 100}, 3_200, 150, None),
        ({"service_tier": "priority", "first_token_ms": 7}, 7, 150, None),
        ({"service_tier": "priority", "deadline_ms": 5_000}, None, None, 5_000),
        ({"service_tier": "flex"}, None, None, FLEX_DEADLINE_MS),
        ({"service_tier": "flex", "deadline_ms": 1}, None, None, 1),
        ({"service_tier": "flex", "first_token_ms": 7}, 7, None, FLEX_DEADLINE_MS),
        ({"service_tier": "flex", "per_token_ms": 7, "prompt_tokens": 9}, None, 7, FLEX_DEADLINE_MS),
    ],
)
def test_targets(wishes: dict[str, Any], first_ms: int | None, each_ms: int | None, deadline_ms: int | None) -> None:
    found = needs(**wishes)
    assert (found.first_token_within_ms, found.per_token_within_ms) == (first_ms, each_ms)
    assert found.deadline_at_ms == (None if deadline_ms is None else NOW + deadline_ms)


def test_what_nobody_said() -> None:
    assert needs() == Needs(model="m", first_token_within_ms=10_000, per_token_within_ms=500)


@pytest.mark.parametrize(
    ("wishes", "policy", "field", "value"),
    [
        ({"quantisations": places("q4_k_m")}, {}, "quantisations", {"q4_k_m"}),
        ({"prompt_tokens": 9}, {}, "prompt_tokens", 9),
        ({"output_tokens_max": 9}, {}, "output_tokens_max", 9),
        ({"service_tier": "flex"}, {}, "service_tier", "flex"),
        ({"strict": True}, {}, "strict", True),
        ({}, {"rings": OWN}, "rings", OWN),
        ({"rings": OWN}, {}, "rings", OWN),
        ({}, {"partners": frozenset({OrgId("o")})}, "partners", {"o"}),
        ({}, {"regions": places("eu-de")}, "regions", {"eu-de"}),
        ({"regions": places("eu-de")}, {"regions": places("eu-de", "eu-at")}, "regions", {"eu-de"}),
        ({"regions": places("eu-de")}, {"countries": places("de")}, "regions", {"eu-de"}),
        ({"regions": places("eu-de")}, {"countries": places("de", "at")}, "countries", {"de", "at"}),
        ({"regions": places("eu-de", "eu-at"), "countries": places("de")}, {}, "regions", {"eu-de", "eu-at"}),
        ({}, {"countries": places("de")}, "countries", {"de"}),
        ({"countries": places("de")}, {"countries": places("de", "at")}, "countries", {"de"}),
        ({"countries": places("de")}, {"regions": places("eu-de", "unknown")}, "countries", {"de"}),
        ({"countries": places("de")}, {"regions": places("eu-de", "eu-at")}, "regions", {"eu-de", "eu-at"}),
        ({}, {"hardware": "cpu"}, "hardware", "cpu"),
        ({"hardware": "cpu"}, {"hardware": "cpu"}, "hardware", "cpu"),
        ({"hardware": "gpu"}, {}, "hardware", "gpu"),
        ({}, {"isolation": "landlock"}, "isolation", "landlock"),
        ({"isolation": "bwrap"}, {"isolation": "landlock"}, "isolation", "bwrap"),
        ({"isolation": "none"}, {}, "isolation", None),
        ({"isolation": "none"}, {"isolation": "none"}, "isolation", None),
        ({}, {"isolation": "none"}, "isolation", None),
        ({}, {"cost_max_micro": 7}, "cost_max_micro", 7),
        ({"cost_max_micro": 7}, {"cost_max_micro": 7}, "cost_max_micro", 7),
        ({"cost_max_micro": 6}, {"cost_max_micro": 7}, "cost_max_micro", 6),
        ({"cost_max_micro": 7}, {}, "cost_max_micro", 7),
        ({}, {"price_max_micro_per_munit": 7}, "price_max_micro_per_munit", 7),
        ({"price_max_micro_per_munit": 6}, {"price_max_micro_per_munit": 7}, "price_max_micro_per_munit", 6),
        ({}, {}, "privacy", "plain"),
        ({}, {"privacy": "padded"}, "privacy", "padded"),
        ({"service_tier": "priority"}, {"privacy": "whole"}, "privacy", "whole"),
        ({}, {"prefer": "fast"}, "prefer", "fast"),
        ({"prefer": "cheap"}, {"prefer": "fast"}, "prefer", "cheap"),
        ({"service_tier": "priority"}, {"prefer": "cheap"}, "prefer", "fast"),
        ({"service_tier": "priority", "prefer": "cheap"}, {}, "prefer", "cheap"),
        ({"service_tier": "flex"}, {}, "prefer", "cheap"),
    ],
)
def test_each_need(wishes: dict[str, Any], policy: dict[str, Any], field: str, value: object) -> None:
    assert getattr(needs(Policy(**policy), **wishes), field) == value


@pytest.mark.parametrize(
    ("wishes", "param", "says"),
    [
        ({"strict": True, "service_tier": "flex"}, "fallow.strict", "flex waits"),
        ({"deadline_ms": 999, "first_token_ms": 1_000}, "fallow.deadline_s", "shorter than first_token_ms"),
        ({"deadline_ms": 999, "first_token_ms": 1_000, "service_tier": "flex"}, "fallow.deadline_s", "shorter than"),
        ({"regions": places("eu-de"), "countries": places("at")}, "fallow.region", "none of eu-de lies in at"),
        (
            {"regions": places("eu-de", "eu-fr"), "countries": places("at", "ch")},
            "fallow.region",
            "none of eu-de and eu-fr lies in at and ch",
        ),
        ({"regions": places("unknown"), "countries": places("de")}, "fallow.region", "none of unknown lies in de"),
    ],
)
def test_contradictions(wishes: dict[str, Any], param: str, says: str) -> None:
    found = failure(**wishes)
    assert (found.code, found.param) == ("invalid_request", param)
    assert found.message.startswith(f"{param}: ")
    assert says in found.message


@pytest.mark.parametrize(
    "wishes",
    [
        {"strict": True, "service_tier": "priority", "deadline_ms": 5_000},
        {"service_tier": "flex", "first_token_ms": 7, "per_token_ms": 7},
        {"service_tier": "flex", "first_token_ms": FLEX_DEADLINE_MS},
        {"service_tier": "priority", "prefer": "cheap"},
        {"deadline_ms": 1_000, "first_token_ms": 1_000},
        {"regions": places("eu-de", "unknown"), "countries": places("de", "at")},
    ],
)
def test_what_is_no_contradiction(wishes: dict[str, Any]) -> None:
    needs(**wishes)


@pytest.mark.parametrize(
    ("wishes", "policy", "param", "says"),
    [
        (
            {"rings": frozenset({"own", "market"})},
            {},
            "fallow.rings",
            "allows own and partner, not market; whoever keeps the hub can change that with key.rings in its settings",
        ),
        ({"rings": frozenset({"partner", "market"})}, {"rings": OWN}, "fallow.rings", "allows own, not market and partner; "),
        ({"regions": places("eu-de", "eu-fr")}, {"regions": places("eu-de")}, "fallow.region", "allows eu-de, not eu-fr; "),
        ({"regions": places("eu-de", "eu-fr")}, {"countries": places("de")}, "fallow.region", "allows the countries de, not eu-fr; "),
        ({"regions": places("unknown")}, {"countries": places("de")}, "fallow.region", "the countries de, not unknown; "),
        (
            {"regions": places("eu-at")},
            {"regions": places("eu-de", "eu-at"), "countries": places("de")},
            "fallow.region",
            "allows the countries de, not eu-at; ",
        ),
        ({"countries": places("de", "fr")}, {"countries": places("de", "at")}, "fallow.country", "allows at and de, not fr; "),
        ({"countries": places("de", "fr")}, {"regions": places("eu-de", "unknown")}, "fallow.country", "eu-de and unknown, not fr; "),
        ({"hardware": "gpu"}, {"hardware": "cpu"}, "fallow.hardware", "allows cpu, not gpu; "),
        ({"isolation": "landlock"}, {"isolation": "bwrap"}, "fallow.isolation", "allows bwrap or stronger, not landlock; "),
        ({"isolation": "none"}, {"isolation": "landlock"}, "fallow.isolation", "landlock or stronger, not none; "),
        (
            {"cost_max_micro": 20_000},
            {"cost_max_micro": 1_999},
            "fallow.max_cost",
            "allows at most 0.001999 credits, not at most 0.02 credits; ",
        ),
        (
            {"price_max_micro_per_munit": 10_000_001},
            {"price_max_micro_per_munit": 10_000_000},
            "fallow.max_price",
            "allows at most 10 credits, not at most 10.000001 credits; ",
        ),
        ({}, {"regions": places("eu-de"), "countries": places("fr")}, "fallow.region", "which exclude each other"),
        ({"rings": OWN}, {"rings": frozenset()}, "fallow.rings", "allows none, not own; "),
    ],
)
def test_more_than_the_key_allows(wishes: dict[str, Any], policy: dict[str, Any], param: str, says: str) -> None:
    found = failure(Policy(**policy), **wishes)
    assert (found.code, found.param) == ("invalid_request", param)
    assert found.message.startswith(f"{param}: your key allows ")
    assert says in found.message
    assert "settings" in found.message


def test_long_lists_are_cut() -> None:
    text = failure(Policy(regions=frozenset(f"eu-de-{n}" for n in range(30))), regions=places("x" * 1_000)).message
    assert f"and {30 - NAMED_MAX + 1} more, not" in text
    assert len(text) < 1_000


@pytest.mark.parametrize(
    ("region", "country"),
    [
        ("eu-de", "de"),
        ("eu-DE", "de"),
        ("eu-de-berlin", "de"),
        ("unknown", None),
        ("", None),
        ("eu-", None),
        ("us-east-1", None),
        ("eu-d1", None),
        ("eu-\xe4\xe4", None),
        ("de", None),
    ],
)
def test_the_country_of_a_region(region: str, country: str | None) -> None:
    assert country_of(region) == country


@pytest.mark.parametrize(
    ("credits_max", "amount_micro"),
    [(1.0, 1_000_000), (0.29, 290_000), (0.57, 570_000), (1e-9, 1), (2.9e-6, 2), (123_456.789012, 123_456_789_012)],
)
def test_micro(credits_max: float, amount_micro: int) -> None:
    assert micro(credits_max) == amount_micro


rings = st.frozensets(st.sampled_from(["own", "partner", "market"]))
regions = st.frozensets(st.sampled_from(["eu-de", "eu-at", "eu-de-south", "unknown"]), max_size=3)
countries = st.frozensets(st.sampled_from(["de", "at", "fr"]), max_size=2)
limits = st.none() | st.integers(1, 10)
kinds = st.sampled_from([None, "cpu", "gpu"])
isolations = st.sampled_from([None, "none", "landlock", "bwrap"])
prefers = st.sampled_from(["cheap", "fast"])
policies = st.builds(
    Policy,
    rings=rings,
    regions=regions,
    countries=countries,
    hardware=kinds,
    isolation=isolations,
    prefer=prefers,
    cost_max_micro=limits,
    price_max_micro_per_munit=limits,
)
askings = st.builds(
    Asked,
    model=st.just("m"),
    prompt_tokens=st.integers(0, 2**33),
    service_tier=st.sampled_from(["default", "flex", "priority"]),
    first_token_ms=limits,
    per_token_ms=limits,
    deadline_ms=limits,
    cost_max_micro=limits,
    price_max_micro_per_munit=limits,
    strict=st.booleans(),
    rings=rings,
    regions=regions,
    countries=countries,
    hardware=kinds,
    isolation=isolations,
    prefer=st.none() | prefers,
)
WISHES = {"strict", "deadline_s", "rings", "region", "country", "hardware", "isolation", "max_cost", "max_price"}


def fits(limit: int | None, ceiling: int | None) -> bool:
    return ceiling is None or (limit is not None and limit <= ceiling)


def runs(needs: Needs | Policy, region: str) -> bool:
    """Whether a node there could run the call."""
    return (not needs.regions or region in needs.regions) and (not needs.countries or country_of(region) in needs.countries)


@PROMISE
@given(askings, policies)
def test_whatever_is_asked_stays_within_the_key(asked: Asked, policy: Policy) -> None:
    found = needs_of(asked, policy, now_ms=NOW)
    if isinstance(found, Failure):
        assert found.code == "invalid_request"
        assert (found.param or "").removeprefix("fallow.") in WISHES
        return
    assert found.rings <= policy.rings
    assert not asked.rings or found.rings == asked.rings
    assert found.hardware == policy.hardware or policy.hardware is None
    assert RANK[found.isolation] >= max(RANK[policy.isolation], RANK[asked.isolation])
    assert fits(found.cost_max_micro, policy.cost_max_micro)
    assert fits(found.cost_max_micro, asked.cost_max_micro)
    assert fits(found.price_max_micro_per_munit, policy.price_max_micro_per_munit)
    assert fits(found.price_max_micro_per_munit, asked.price_max_micro_per_munit)
    there = {"eu-de", "eu-at", "eu-de-south", "unknown", "eu-fr", "us"}
    allowed = {region for region in there if runs(found, region)}
    assert allowed
    assert all(runs(policy, region) for region in allowed)
    assert fits(found.deadline_at_ms, None if asked.deadline_ms is None else NOW + asked.deadline_ms)
    assert fits(found.first_token_within_ms, asked.first_token_ms)
    assert fits(found.per_token_within_ms, asked.per_token_ms)
    assert {found.deadline_at_ms, found.first_token_within_ms} != {None}, "every call has a target"


@PROMISE
@given(askings, policies)
def test_asking_for_nothing_is_never_too_much(asked: Asked, policy: Policy) -> None:
    """Only a key that allows nowhere refuses a call without wishes."""
    plain = needs_of(Asked(model=asked.model, service_tier=asked.service_tier), policy, now_ms=NOW)
    nowhere = bool(policy.regions and policy.countries) and not {country_of(one) for one in policy.regions} & policy.countries
    assert isinstance(plain, Failure) == nowhere
