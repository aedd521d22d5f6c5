"""What a caller wishes of the machine that answers: the `fallow` object of a JSON body, and the same wishes as headers."""

from collections.abc import Sequence
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import Meta

from fallow.core.needs import Asked, micro
from fallow.model.errors import InvalidRequest, shortened
from fallow.model.needs import HardwareKind, Isolation, Prefer, Ring, ServiceTier
from fallow.wire import complaint

FIRST_TOKEN_MS_MAX = 3_600_000
PER_TOKEN_MS_MAX = 600_000
DEADLINE_S_MAX = 86_400
CREDITS_MAX = 1_000_000
RINGS_MAX = 3
PLACES_MAX = 64
QUANTISATIONS_MAX = 16
HEADERS_BYTES_MAX = 4_096
"""All values of our headers together."""
OBJECT = "fallow"
PREFIX = b"fallow-"
TIER_HEADER = "Fallow-Service-Tier"
"""Beside the wishes, for requests that have no `service_tier` of their own."""

Region = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}\Z")]
Country = Annotated[str, Meta(pattern=r"^[A-Za-z]{2}\Z")]
Quantisation = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")]
Credits = Annotated[float, Meta(gt=0, le=CREDITS_MAX)]
Places = Meta(min_length=1, max_length=PLACES_MAX)


class Wishes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a call needs of the machine that runs it. A wish may only narrow what the API key allows."""

    first_token_ms: Annotated[
        Annotated[int, Meta(ge=1, le=FIRST_TOKEN_MS_MAX)] | None,
        Meta(description=f"milliseconds within which the first token must come, from 1 to {FIRST_TOKEN_MS_MAX}"),
    ] = None
    per_token_ms: Annotated[
        Annotated[int, Meta(ge=1, le=PER_TOKEN_MS_MAX)] | None,
        Meta(description=f"milliseconds that each further token may take, as a mean over the answer, from 1 to {PER_TOKEN_MS_MAX}"),
    ] = None
    deadline_s: Annotated[
        Annotated[float, Meta(gt=0, le=DEADLINE_S_MAX)] | None,
        Meta(description=f"seconds within which the whole answer must be there, over 0 and up to {DEADLINE_S_MAX}"),
    ] = None
    max_cost: Annotated[
        Credits | None,
        Meta(description=f"the most that the whole call may cost, in credits (1 credit is 1 USD), over 0 and up to {CREDITS_MAX}"),
    ] = None
    max_price: Annotated[
        Credits | None,
        Meta(description=f"the most that a million output tokens may cost, in credits, over 0 and up to {CREDITS_MAX}"),
    ] = None
    strict: Annotated[bool | None, Meta(description="true or false: whether to refuse a call that is likely to miss its targets")] = None
    rings: Annotated[
        Annotated[tuple[Ring, ...], Meta(min_length=1, max_length=RINGS_MAX)] | None,
        Meta(description="a list of own, partner and market: whose nodes may run it. The owner of a node can read what runs on it"),
    ] = None
    region: Annotated[
        Region | Annotated[tuple[Region, ...], Places] | None,
        Meta(description=f'a region such as "eu-de", or a list of up to {PLACES_MAX}'),
    ] = None
    country: Annotated[
        Country | Annotated[tuple[Country, ...], Places] | None,
        Meta(description=f'a country\'s two letters, such as "de", or a list of up to {PLACES_MAX}'),
    ] = None
    hardware: Annotated[HardwareKind | None, Meta(description="cpu or gpu")] = None
    isolation: Annotated[
        Isolation | None,
        Meta(description="none, landlock or bwrap: how the engine must at least be kept apart from the rest of the node"),
    ] = None
    prefer: Annotated[Prefer | None, Meta(description="cheap or fast: what counts among the machines that meet the needs")] = None
    quantisations: Annotated[
        Quantisation | Annotated[tuple[Quantisation, ...], Meta(min_length=1, max_length=QUANTISATIONS_MAX)] | None,
        Meta(description=f'a quantisation such as "Q4_K_M", or a list of up to {QUANTISATIONS_MAX}, where `model` names a family'),
    ] = None


def header_of(wish: str) -> str:
    """The header that says the same as a field of the object: `Fallow-Max-Cost` for `max_cost`."""
    return "-".join(word.capitalize() for word in (OBJECT, *wish.split("_")))


ABOUT: dict[str, str] = {
    name: next(one.description or "" for one in kind.__metadata__ if isinstance(one, Meta))
    for name, kind in get_type_hints(Wishes, include_extras=True).items()
}
"""What each wish takes, in words."""
HEADERS: dict[str, str] = {header_of(name): name for name in ABOUT}
_BY_LINE = {name.lower().encode(): wish for name, wish in HEADERS.items()}
_TIER_LINE = TIER_HEADER.lower().encode()
LISTS = frozenset({"rings", "region", "country", "quantisations"})
"""The wishes that may be several; in a header there are commas between them."""
Lines = Sequence[tuple[bytes, bytes]]


def wrong(found: complaint.Complaint) -> InvalidRequest:
    """What is wrong with the object of a body; `found.path` begins with `fallow.`."""
    name = found.path.removeprefix(f"{OBJECT}.").partition("[")[0]
    path = shortened(found.path)
    if found.kind == "unknown" or name not in ABOUT:
        return InvalidRequest(f"{path}: there is no such wish; there are: {', '.join(ABOUT)}", param=found.path)
    return InvalidRequest(f"{path}: {found.message}; it takes {ABOUT[name]}", param=found.path)


def from_headers(lines: Lines) -> Wishes | None:
    """The wishes among a request's headers, None without any; raises InvalidRequest with the header as `param`."""
    said: dict[str, list[str]] = {}
    for name, value in _ours(lines):
        wish = _BY_LINE.get(name)
        if wish is None:
            shown = shortened(name.decode("latin-1"))
            there = ", ".join((*HEADERS, TIER_HEADER))
            raise InvalidRequest(f"{shown}: there is no such header; there are: {there}", param=shown)
        said.setdefault(wish, []).append(value.decode("latin-1"))
    if not said:
        return None
    fields: dict[str, Any] = {}
    for wish, values in said.items():
        if wish in LISTS:
            fields[wish] = [part.strip() for part in ",".join(values).split(",")]
        elif len(values) == 1 and values[0].strip().lower() != "null":  # which msgspec takes for None
            fields[wish] = values[0].strip()
        else:
            raise _wrong_header(wish)
    try:
        return msgspec.convert(fields, Wishes, strict=False)
    except msgspec.ValidationError as error:
        raise _wrong_header(complaint.read(str(error)).path.partition("[")[0]) from None


def values_of(header: str, lines: Lines) -> list[str]:
    """What the lines of a header say."""
    wanted = header.lower().encode()
    return [value.strip().decode("latin-1") for name, value in lines if name.lower() == wanted]


def joined(body: Wishes, headers: Wishes | None) -> Wishes:
    """The wishes of both places; raises InvalidRequest where they say different things."""
    if headers is None:
        return body
    fields = msgspec.structs.asdict(body)
    for name, value in msgspec.structs.asdict(headers).items():
        if fields[name] is None:
            fields[name] = value
        elif value is not None and _alike(name, fields[name]) != _alike(name, value):
            path = f"{OBJECT}.{name}"
            raise InvalidRequest(f"{path} and the header {header_of(name)} differ; say it in one place", param=path)
    return Wishes(**fields)


def asked_for(
    wishes: Wishes, *, model: str, prompt_tokens: int = 0, output_tokens_max: int | None = None, service_tier: ServiceTier = "default"
) -> Asked:
    """A call's wishes in the units of the network, with what else its head says."""
    return Asked(
        model=model,
        prompt_tokens=prompt_tokens,
        output_tokens_max=output_tokens_max,
        service_tier=service_tier,
        first_token_ms=wishes.first_token_ms,
        per_token_ms=wishes.per_token_ms,
        deadline_ms=None if wishes.deadline_s is None else max(1, round(wishes.deadline_s * 1000)),
        cost_max_micro=None if wishes.max_cost is None else micro(wishes.max_cost),
        price_max_micro_per_munit=None if wishes.max_price is None else micro(wishes.max_price),
        strict=bool(wishes.strict),
        rings=frozenset(wishes.rings or ()),
        regions=frozenset(_listed(wishes.region)),
        countries=frozenset(one.lower() for one in _listed(wishes.country)),
        hardware=wishes.hardware,
        isolation=wishes.isolation,
        prefer=wishes.prefer,
        quantisations=frozenset(one.casefold() for one in _listed(wishes.quantisations)),
    )


def _ours(lines: Lines) -> list[tuple[bytes, bytes]]:
    """The headers that begin with ours, but for the tier's, with small letters; raises InvalidRequest if they are too long."""
    found = [(name.lower(), value) for name, value in lines if name[:7].lower() == PREFIX and name.lower() != _TIER_LINE]
    if sum(len(value) for _, value in found) > HEADERS_BYTES_MAX:
        shown = found[0][0].decode("latin-1")
        raise InvalidRequest(f"{shortened(shown)}: all headers of Fallow together are over {HEADERS_BYTES_MAX} bytes", param=shown)
    return found


def _wrong_header(wish: str) -> InvalidRequest:
    header = header_of(wish)
    return InvalidRequest(f"the header {header} takes {ABOUT[wish]}, once", param=header)


def _listed(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value or ()


def _alike(wish: str, value: Any) -> Any:
    """A wish in a form that is equal where the meaning is."""
    if not isinstance(value, str | tuple):
        return value
    return frozenset(one if wish == "region" else one.casefold() for one in _listed(value))
