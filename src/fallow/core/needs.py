"""A call's needs: what its caller asked for, within what the key allows, and the tier's targets where nobody said any."""

import math
from collections.abc import Collection, Iterator
from typing import NamedTuple, get_args

import msgspec

from fallow.model.errors import Failure, shortened
from fallow.model.needs import HardwareKind, Isolation, Needs, Policy, Prefer, Ring, ServiceTier

MICRO = 1_000_000
"""Micro-credits in a credit, which is 1 USD of account."""
FLEX_DEADLINE_MS = 3_600_000
"""By when a `flex` call that says nothing of it must have ended, from its arrival."""
NAMED_MAX = 8
"""How many values a message lists."""
_STRONGER: tuple[Isolation, ...] = get_args(Isolation)


class Targets(NamedTuple):
    """What a tier promises, in milliseconds: the first token within `base + each * prompt tokens`, then the mean of a token."""

    first_token_base_ms: int
    first_token_each_ms: int
    per_token_ms: int


TARGETS: dict[ServiceTier, Targets | None] = {
    "default": Targets(first_token_base_ms=10_000, first_token_each_ms=10, per_token_ms=500),
    "priority": Targets(first_token_base_ms=3_000, first_token_each_ms=2, per_token_ms=150),
    "flex": None,
}


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller said of one call; None, an empty set and False mean that they didn't. Quantisations are casefolded."""

    model: str
    prompt_tokens: int = 0
    output_tokens_max: int | None = None
    service_tier: ServiceTier = "default"
    first_token_ms: int | None = None
    per_token_ms: int | None = None
    deadline_ms: int | None = None
    cost_max_micro: int | None = None
    price_max_micro_per_munit: int | None = None
    strict: bool = False
    rings: frozenset[Ring] = frozenset()
    regions: frozenset[str] = frozenset()
    countries: frozenset[str] = frozenset()
    hardware: HardwareKind | None = None
    isolation: Isolation | None = None
    prefer: Prefer | None = None
    quantisations: frozenset[str] = frozenset()


def needs_of(asked: Asked, policy: Policy, *, now_ms: int) -> Needs | Failure:
    """What the call needs, never more than its key allows; or `invalid_request`, with the wish that can't be met as `param`.

    `now_ms` is the wall clock's time at which the call arrived.
    """
    wrong = _contradiction(asked) or next(_excesses(asked, policy), None) or _nowhere(asked, policy)
    if wrong is not None:
        return wrong
    first_token_ms, per_token_ms, deadline_ms = _targets(asked)
    isolation = asked.isolation or policy.isolation
    return Needs(
        model=asked.model,
        quantisations=asked.quantisations,
        prompt_tokens=asked.prompt_tokens,
        output_tokens_max=asked.output_tokens_max,
        service_tier=asked.service_tier,
        deadline_at_ms=None if deadline_ms is None else now_ms + deadline_ms,
        first_token_within_ms=first_token_ms,
        per_token_within_ms=per_token_ms,
        cost_max_micro=policy.cost_max_micro if asked.cost_max_micro is None else asked.cost_max_micro,
        price_max_micro_per_munit=_either(asked.price_max_micro_per_munit, policy.price_max_micro_per_munit),
        strict=asked.strict,
        prefer=asked.prefer or ("fast" if asked.service_tier == "priority" else policy.prefer),
        rings=asked.rings or policy.rings,
        partners=policy.partners,
        regions=asked.regions or policy.regions,
        countries=asked.countries or policy.countries,
        hardware=asked.hardware or policy.hardware,
        isolation=None if isolation == "none" else isolation,
        privacy=policy.privacy,
    )


def country_of(region: str) -> str | None:
    """The country that a region names: `de` for `eu-de` and `eu-de-berlin`; None for `unknown` and whatever names none."""
    parts = region.split("-", 2)
    country = parts[1].lower() if len(parts) > 1 else ""
    return country if len(country) == 2 and country.isascii() and country.isalpha() else None


def micro(credits_max: float) -> int:
    """A limit in credits as micro-credits, rounded down so that it isn't passed; 1 at least, since 0 would be no wish."""
    return max(1, math.floor(round(credits_max * MICRO, 3)))  # 0.29 * 1e6 is a hair's breadth off in binary


def _either(asked: int | None, allowed: int | None) -> int | None:
    return allowed if asked is None else asked


def is_hasty(needs: Needs) -> bool:
    """Whether the first token is wanted sooner than is usual for the tier."""
    usual, within_ms = TARGETS.get(needs.service_tier), needs.first_token_within_ms
    if usual is None or within_ms is None:
        return False
    return within_ms < usual.first_token_base_ms + usual.first_token_each_ms * needs.prompt_tokens


def _targets(asked: Asked) -> tuple[int | None, int | None, int | None]:
    """First token, per token and deadline, in milliseconds. A deadline alone stands for the tier's other targets."""
    first, each, deadline = asked.first_token_ms, asked.per_token_ms, asked.deadline_ms
    usual = TARGETS[asked.service_tier]
    if usual is None:
        return first, each, FLEX_DEADLINE_MS if deadline is None else deadline
    if deadline is not None and first is None and each is None:
        return None, None, deadline
    first = usual.first_token_base_ms + usual.first_token_each_ms * asked.prompt_tokens if first is None else first
    return first, usual.per_token_ms if each is None else each, deadline


def _contradiction(asked: Asked) -> Failure | None:
    """What can't be true at once."""
    if asked.strict and asked.service_tier == "flex":
        return _failure("strict", "it refuses rather than waits, and the tier flex waits; leave one of them out")
    if asked.deadline_ms is not None and asked.first_token_ms is not None and asked.deadline_ms < asked.first_token_ms:
        return _failure("deadline_s", "it is shorter than first_token_ms; give a later deadline, or an earlier first token")
    if _exclude(asked.regions, asked.countries):
        text = f"none of {_words(asked.regions)} lies in {_words(asked.countries)}; leave out region or country, or let them agree"
        return _failure("region", text)
    return None


def _exclude(regions: Collection[str], countries: Collection[str]) -> bool:
    """Whether no region lies in any of the countries, where both are limited."""
    return bool(regions and countries) and not any(country_of(region) in countries for region in regions)


def _excesses(asked: Asked, policy: Policy) -> Iterator[Failure]:
    """Where the call asks for more than its key allows."""
    if beyond := asked.rings - policy.rings:
        yield _over("rings", _words(policy.rings), _words(beyond), "rings")
    if policy.regions and (beyond_regions := asked.regions - policy.regions):
        yield _over("region", _words(policy.regions), _words(beyond_regions), "regions")
    if policy.countries and (abroad := [one for one in asked.regions if country_of(one) not in policy.countries]):
        yield _over("region", f"the countries {_words(policy.countries)}", _words(abroad), "countries")
    if policy.countries and (beyond_countries := asked.countries - policy.countries):
        yield _over("country", _words(policy.countries), _words(beyond_countries), "countries")
    if policy.regions and (foreign := asked.countries.difference(map(country_of, policy.regions))):
        yield _over("country", f"the regions {_words(policy.regions)}", _words(foreign), "regions")
    if policy.hardware is not None and asked.hardware not in (None, policy.hardware):
        yield _over("hardware", policy.hardware, str(asked.hardware), "hardware")
    if asked.isolation is not None and _STRONGER.index(asked.isolation) < _STRONGER.index(policy.isolation or "none"):
        yield _over("isolation", f"{policy.isolation} or stronger", asked.isolation, "isolation")
    if asked.cost_max_micro is not None and asked.cost_max_micro > _most(policy.cost_max_micro):
        yield _over("max_cost", _credits(policy.cost_max_micro), _credits(asked.cost_max_micro), "max_cost")
    if asked.price_max_micro_per_munit is not None and asked.price_max_micro_per_munit > _most(policy.price_max_micro_per_munit):
        yield _over("max_price", _credits(policy.price_max_micro_per_munit), _credits(asked.price_max_micro_per_munit), "max_price")


def _nowhere(asked: Asked, policy: Policy) -> Failure | None:
    """A key whose own regions and countries exclude each other allows no call."""
    if not _exclude(asked.regions or policy.regions, asked.countries or policy.countries):
        return None
    where = f"regions {_words(policy.regions)} and the countries {_words(policy.countries)}"
    return _failure("region", f"your key allows the {where} only, which exclude each other; {_lifted('regions')}")


def _most(limit: int | None) -> float:
    return math.inf if limit is None else limit


def _over(wish: str, allowed: str, wished: str, setting: str) -> Failure:
    return _failure(wish, f"your key allows {allowed}, not {wished}; {_lifted(setting)}")


def _lifted(setting: str) -> str:
    return f"whoever keeps the hub can change that with key.{setting} in its settings"


def _failure(wish: str, message: str) -> Failure:
    return Failure(code="invalid_request", message=f"fallow.{wish}: {message}", param=f"fallow.{wish}")


def _words(values: Collection[str]) -> str:
    """A few values as a text: `own, partner and market`."""
    words = [shortened(value) for value in sorted(values)]
    if len(words) > NAMED_MAX:
        words = [*words[: NAMED_MAX - 1], f"{len(words) - NAMED_MAX + 1} more"]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words) or "none"


def _credits(amount_micro: int | None) -> str:
    return f"at most {(amount_micro or 0) / MICRO:.6f}".rstrip("0").rstrip(".") + " credits"
