"""What an API key may be limited in, as one value, and how the words of who runs the hub change it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from fallow.apps.lend_settings import Usd
from fallow.apps.settings import Country, Name
from fallow.core.needs import micro
from fallow.model.call import PER_MINUTE_MAX, WEIGHT_MAX, Allowance
from fallow.model.errors import BadFlag
from fallow.model.identity import ApiKey
from fallow.model.ids import OrgId
from fallow.model.needs import HardwareKind, Isolation, Policy, Prefer, Privacy, Ring
from fallow.wire import complaint

LIMITS_BYTES_MAX = 8 * 1024
"""What a key's limits may take of the message in which gateways hear of them; the rest is room for partners."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """All that a key may be limited in. Empty `models` are all; a budget None is no limit; `expires_at_ms` None: never."""

    policy: Policy = Policy()
    allowance: Allowance = Allowance()
    models: frozenset[str] = frozenset()
    budget_micro: int | None = None
    expires_at_ms: int | None = None

    def fields(self) -> dict[str, Any]:
        """The same, as an ApiKey names them."""
        return msgspec.structs.asdict(self)


UNLIMITED = Limits()


class Wishes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is to be changed; None: left as it is. An empty list or text, or a cost of 0, lifts a limit. Costs are in credits."""

    rings: Annotated[tuple[Ring, ...], Meta(min_length=1, max_length=3)] | None = None
    partners: Annotated[tuple[Name, ...], Meta(max_length=256)] | None = None
    regions: Annotated[tuple[Name, ...], Meta(max_length=256)] | None = None
    countries: Annotated[tuple[Country, ...], Meta(max_length=256)] | None = None
    hardware: Literal["", "cpu", "gpu"] | None = None
    isolation: Isolation | None = None
    prefer: Prefer | None = None
    max_cost: Usd | None = None
    max_price: Usd | None = None
    concurrency: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    calls_per_minute: Annotated[int, Meta(ge=0, le=PER_MINUTE_MAX)] | None = None
    tokens_per_minute: Annotated[int, Meta(ge=0, le=PER_MINUTE_MAX)] | None = None
    weight: Annotated[float, Meta(ge=1 / WEIGHT_MAX, le=WEIGHT_MAX)] | None = None
    models: Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=200)], ...], Meta(max_length=64)] | None = None
    budget: Usd | None = None
    privacy: Privacy | None = None


_KINDS: dict[str, Any] = {"rings": Ring, "hardware": HardwareKind, "isolation": Isolation, "prefer": Prefer, "privacy": Privacy}
_CHOICES = {name: f"; it may be {', '.join(get_args(kind))}" for name, kind in _KINDS.items()}


def wishes_of(said: Mapping[str, object]) -> Wishes:
    """Wishes by the names of flags; raises BadFlag."""
    try:
        return msgspec.convert({name: value for name, value in said.items() if value is not None}, Wishes)
    except msgspec.ValidationError as error:
        found = complaint.read(str(error))
        name = found.path.partition("[")[0]
        raise BadFlag(f"--{name.replace('_', '-')}: {found.message}{_CHOICES.get(name, '')}") from None


def limits_of(key: ApiKey) -> Limits:
    """A key's limits, as one value."""
    return Limits(**{name: getattr(key, name) for name in Limits.__struct_fields__})


def limited(limits: Limits, wishes: Wishes) -> Limits:
    """The limits with the wishes carried out; raises BadFlag if they are too many to be told."""
    changed = wished(limits, wishes)
    check_size(changed)
    return changed


def wished(limits: Limits, wishes: Wishes) -> Limits:
    """The same, however many they are."""
    policy: dict[str, Any] = {
        "rings": _set(wishes.rings),
        "partners": None if wishes.partners is None else frozenset(map(OrgId, wishes.partners)),
        "regions": _set(wishes.regions),
        "countries": _set(wishes.countries),
        "prefer": wishes.prefer,
        "privacy": wishes.privacy,
    }
    allowance = {
        "concurrency_max": wishes.concurrency,
        "calls_per_minute": wishes.calls_per_minute,
        "tokens_per_minute": wishes.tokens_per_minute,
        "weight": wishes.weight,
    }
    lifting = {
        "hardware": (wishes.hardware, ""),
        "isolation": (wishes.isolation, "none"),
        "cost_max_micro": (_micro(wishes.max_cost), 0),
        "price_max_micro_per_munit": (_micro(wishes.max_price), 0),
    }
    lifted = {name: None if value == free else value for name, (value, free) in lifting.items() if value is not None}
    return msgspec.structs.replace(
        limits,
        policy=msgspec.structs.replace(limits.policy, **_given(policy), **lifted),
        allowance=msgspec.structs.replace(limits.allowance, **_given(allowance)),
        models=limits.models if wishes.models is None else frozenset(wishes.models),
        budget_micro=limits.budget_micro if wishes.budget is None else _micro(wishes.budget) or None,
    )


def check_size(limits: Limits) -> None:
    """Raises BadFlag if gateways couldn't be told of the limits."""
    size = len(msgspec.msgpack.encode(limits))
    if size > LIMITS_BYTES_MAX:
        text = f"what the key allows takes {size} bytes, the limit is {LIMITS_BYTES_MAX}: name fewer models, partners, regions or countries"
        raise BadFlag(text)


def _given(fields: Mapping[str, object]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _set(values: tuple[str, ...] | None) -> frozenset[str] | None:
    return None if values is None else frozenset(values)


def _micro(amount: float | None) -> int | None:
    return amount if amount is None else micro(amount) if amount else 0
