"""Wishes: each field of the object, the same as headers, both together, and as the `openai` package sends them."""

from typing import Any

import httpx2
import msgspec
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.core.needs import Asked
from fallow.model.errors import InvalidRequest
from fallow.wire.openai import CHAT, asked_of, read_head
from fallow.wire.wishes import (
    ABOUT,
    CREDITS_MAX,
    DEADLINE_S_MAX,
    FIRST_TOKEN_MS_MAX,
    HEADERS,
    HEADERS_BYTES_MAX,
    PER_TOKEN_MS_MAX,
    PLACES_MAX,
    QUANTISATIONS_MAX,
    TIER_HEADER,
    Wishes,
    asked_for,
    from_headers,
    header_of,
    joined,
)

PROMISE = settings(max_examples=200)
GOOD: list[tuple[str, Any, str, dict[str, Any]]] = [
    ("first_token_ms", 1, "1", {"first_token_ms": 1}),
    ("first_token_ms", FIRST_TOKEN_MS_MAX, "3600000", {"first_token_ms": 3_600_000}),
    ("per_token_ms", 1, "1", {"per_token_ms": 1}),
    ("per_token_ms", PER_TOKEN_MS_MAX, "600000", {"per_token_ms": 600_000}),
    ("deadline_s", 0.0001, "0.0001", {"deadline_ms": 1}),
    ("deadline_s", 1.5, "1.5", {"deadline_ms": 1_500}),
    ("deadline_s", DEADLINE_S_MAX, "86400", {"deadline_ms": 86_400_000}),
    ("max_cost", 0.002, "0.002", {"cost_max_micro": 2_000}),
    ("max_cost", 1e-9, "1e-9", {"cost_max_micro": 1}),
    ("max_cost", 0.0000019, "0.0000019", {"cost_max_micro": 1}),
    ("max_cost", 0.29, "0.29", {"cost_max_micro": 290_000}),
    ("max_cost", CREDITS_MAX, "1000000", {"cost_max_micro": 10**12}),
    ("max_price", 3, "3", {"price_max_micro_per_munit": 3_000_000}),
    ("strict", True, "true", {"strict": True}),
    ("strict", False, "false", {"strict": False}),
    ("rings", ["own"], "own", {"rings": frozenset({"own"})}),
    ("rings", ["own", "partner", "market"], "own, partner ,market", {"rings": frozenset({"own", "partner", "market"})}),
    ("region", "eu-de", "eu-de", {"regions": frozenset({"eu-de"})}),
    ("region", ["eu-de", "unknown"], "eu-de,unknown", {"regions": frozenset({"eu-de", "unknown"})}),
    ("country", "de", "de", {"countries": frozenset({"de"})}),
    ("country", ["DE", "at"], "DE, at", {"countries": frozenset({"de", "at"})}),
    ("hardware", "gpu", "gpu", {"hardware": "gpu"}),
    ("isolation", "none", "none", {"isolation": "none"}),
    ("isolation", "bwrap", "bwrap", {"isolation": "bwrap"}),
    ("prefer", "fast", "fast", {"prefer": "fast"}),
    ("quantisations", "Q4_K_M", "Q4_K_M", {"quantisations": frozenset({"q4_k_m"})}),
    ("quantisations", ["q4_k_m", "INT8"], "q4_k_m, INT8", {"quantisations": frozenset({"q4_k_m", "int8"})}),
]
BAD: list[tuple[str, Any, str | None]] = [
    ("first_token_ms", 0, "0"),
    ("first_token_ms", FIRST_TOKEN_MS_MAX + 1, "3600001"),
    ("first_token_ms", 1.5, "1.5"),
    ("first_token_ms", "1500", "soon"),
    ("first_token_ms", True, "null"),
    ("first_token_ms", [1], "1, 2"),
    ("per_token_ms", 0, ""),
    ("per_token_ms", PER_TOKEN_MS_MAX + 1, "600001"),
    ("deadline_s", 0, "0"),
    ("deadline_s", -1, "nan"),
    ("deadline_s", DEADLINE_S_MAX + 1, "inf"),
    ("max_cost", 0, "0"),
    ("max_cost", CREDITS_MAX * 2, "2e6"),
    ("max_cost", "0.1", "0,1"),
    ("max_price", 0.0, "-0"),
    ("strict", 1, "yes"),
    ("rings", [], ""),
    ("rings", "own", "Own"),
    ("rings", ["own", "friends"], "own, friends"),
    ("rings", ["own"] * 4, "own,own,own,own"),
    ("region", "", ""),
    ("region", [], "eu-de,"),
    ("region", "eu de", "eu de"),
    ("region", "a" * 64, "a" * 64),
    ("region", ["eu-de"] * (PLACES_MAX + 1), ",".join(["eu-de"] * (PLACES_MAX + 1))),
    ("region", 7, "\xe4"),
    ("country", "deu", "deu"),
    ("country", ["d1"], "d1"),
    ("country", "de\n", "de,"),
    ("hardware", "tpu", "tpu"),
    ("hardware", ["cpu"], "cpu,gpu"),
    ("isolation", "", ""),
    ("prefer", "best", "best"),
    ("quantisations", ["Q4"] * (QUANTISATIONS_MAX + 1), ",".join(["Q4"] * (QUANTISATIONS_MAX + 1))),
    ("quantisations", "", ""),
]


def lines_of(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]


def read(fields: Any) -> Wishes:
    head = read_head(CHAT, msgspec.json.encode({"model": "m", "fallow": fields}))
    assert isinstance(head.fallow, Wishes)
    return head.fallow


def test_the_tables_have_every_wish() -> None:
    assert {row[0] for row in GOOD} == {row[0] for row in BAD} == set(ABOUT)
    assert list(HEADERS) == [header_of(name) for name in ABOUT]
    assert HEADERS["Fallow-First-Token-Ms"] == "first_token_ms"
    assert all(ABOUT.values())


@pytest.mark.parametrize(("name", "value", "text", "asked"), GOOD)
def test_a_wish_in_the_body_and_as_a_header(name: str, value: Any, text: str, asked: dict[str, Any]) -> None:
    in_body = read({name: value})
    as_header = from_headers([(b"host", b"x"), (header_of(name).lower().encode(), text.encode())])
    assert as_header is not None
    for wishes in (in_body, as_header, joined(in_body, None), joined(in_body, as_header), joined(Wishes(), as_header)):
        assert asked_for(wishes, model="m") == Asked(model="m", **asked)


@pytest.mark.parametrize(("name", "value", "text"), BAD)
def test_a_wish_that_is_wrong(name: str, value: Any, text: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read({name: value})
    assert caught.value.param is not None
    assert caught.value.param.partition("[")[0] == f"fallow.{name}"
    assert caught.value.message.startswith(caught.value.param)
    assert ABOUT[name] in caught.value.message
    if text is not None:
        with pytest.raises(InvalidRequest) as caught:
            from_headers(lines_of({header_of(name): text}))
        assert caught.value.param == header_of(name)
        assert caught.value.message == f"the header {header_of(name)} takes {ABOUT[name]}, once"


@pytest.mark.parametrize("name", list(ABOUT))
def test_null_is_no_wish(name: str) -> None:
    assert read({name: None}) == Wishes()


def test_a_wish_that_there_is_not() -> None:
    with pytest.raises(InvalidRequest) as caught:
        read({"ring": ["own"]})
    assert caught.value.param == "fallow.ring"
    assert caught.value.message == f"fallow.ring: there is no such wish; there are: {', '.join(ABOUT)}"
    with pytest.raises(InvalidRequest) as caught:
        from_headers([(b"Fallow-Ring", b"own")])
    assert caught.value.param == "fallow-ring"
    assert "there is no such header" in caught.value.message
    assert all(name in caught.value.message for name in (*HEADERS, TIER_HEADER))


def test_headers_that_are_not_wishes() -> None:
    assert from_headers([]) is None
    lines = [(b"authorization", b"Bearer x"), (b"x-fallow-rings", b"own"), (b"fallow", b"x"), (TIER_HEADER.lower().encode(), b"flex")]
    assert from_headers(lines) is None


def test_a_header_on_several_lines() -> None:
    assert from_headers([(b"fallow-rings", b"own"), (b"FALLOW-RINGS", b"partner")]) == Wishes(rings=("own", "partner"))
    with pytest.raises(InvalidRequest, match="once"):
        from_headers([(b"fallow-strict", b"true"), (b"fallow-strict", b"true")])


def test_headers_are_bounded() -> None:
    region = ("eu-de," * PLACES_MAX).strip(",").encode()
    assert from_headers([(b"fallow-region", region)]) is not None
    with pytest.raises(InvalidRequest, match=str(HEADERS_BYTES_MAX)) as caught:
        from_headers([(b"fallow-region", b"a" * HEADERS_BYTES_MAX), (b"fallow-strict", b"true")])
    assert caught.value.param == "fallow-region"


@pytest.mark.parametrize(
    ("body", "header"),
    [
        (Wishes(max_cost=0.1), Wishes(max_cost=0.2)),
        (Wishes(strict=True), Wishes(strict=False)),
        (Wishes(rings=("own",)), Wishes(rings=("own", "partner"))),
        (Wishes(region="eu-de"), Wishes(region="EU-DE")),
        (Wishes(country="de"), Wishes(country="at")),
        (Wishes(prefer="fast"), Wishes(prefer="cheap")),
    ],
)
def test_two_places_that_differ(body: Wishes, header: Wishes) -> None:
    with pytest.raises(InvalidRequest, match="differ") as caught:
        joined(body, header)
    wish = (caught.value.param or "").removeprefix("fallow.")
    assert getattr(body, wish) != getattr(header, wish)
    assert header_of(wish) in caught.value.message


@pytest.mark.parametrize(
    ("body", "header"),
    [
        (Wishes(rings=("own", "partner")), Wishes(rings=("partner", "own"))),
        (Wishes(country="DE"), Wishes(country=("de",))),
        (Wishes(quantisations=("Q8_0",)), Wishes(quantisations="q8_0")),
        (Wishes(region="eu-de"), Wishes(region=("eu-de",))),
    ],
)
def test_two_places_that_mean_the_same(body: Wishes, header: Wishes) -> None:
    assert joined(body, header) == body


texts = st.text(st.characters(codec="latin-1"), max_size=12) | st.sampled_from([row[2] for row in GOOD])


@PROMISE
@given(st.dictionaries(st.sampled_from([*HEADERS, TIER_HEADER]), texts, max_size=4))
def test_any_headers_are_read_or_refused_by_name(headers: dict[str, str]) -> None:
    wishes, named = None, ""
    try:
        wishes = from_headers(lines_of(headers))
    except InvalidRequest as error:
        named = error.param or "nothing"
    if named:
        assert named in headers
        return
    given_ones = {HEADERS[name] for name in headers if name in HEADERS}
    assert (wishes is None) == (not given_ones)
    if wishes is not None:
        assert {name for name, value in msgspec.structs.asdict(wishes).items() if value is not None} == given_ones


def test_the_openai_package_carries_the_object_and_the_headers() -> None:
    """As callers send it: `extra_body` and `extra_headers`."""
    sent: list[httpx2.Request] = []

    def take(request: httpx2.Request) -> httpx2.Response:
        sent.append(request)
        return httpx2.Response(200, json={"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": []})

    with openai.OpenAI(
        base_url="http://gateway/v1", api_key="k", http_client=httpx2.Client(transport=httpx2.MockTransport(take))
    ) as client:
        client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "Hello"}],
            extra_body={"fallow": {"max_cost": 0.002, "rings": ["own"], "country": "de"}},
            extra_headers={"Fallow-First-Token-Ms": "1500", "Fallow-Service-Tier": "priority"},
        )
    [request] = sent
    lines = [(name.lower(), value) for name, value in request.headers.raw]
    asked = asked_of(read_head(CHAT, request.content), 0, lines)
    assert asked == Asked(
        model="m",
        service_tier="priority",
        first_token_ms=1_500,
        cost_max_micro=2_000,
        rings=frozenset({"own"}),
        countries=frozenset({"de"}),
    )
