"""Whether a node takes a call: every refusal under its code, and nothing taken beyond a limit."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.core.admit import (
    BODIES_BYTES_MAX,
    BODY_BYTES_MAX,
    BUSY_RETRY_AFTER_MS,
    GATEWAY_BODIES_BYTES_MAX,
    GATEWAY_CALLS_MAX,
    GATEWAY_RETRY_AFTER_MS,
    LEASE_MS,
    Desk,
    admit,
    admit_call,
    is_abandoned,
    terms,
)
from fallow.model.ids import AttemptId, CallId, GatewayId, KeyId, OrgId
from fallow.model.messages import Request
from fallow.model.offer import Price

PROMISE = settings(max_examples=60)
OFFERED = {"tiny": {"/v1/chat/completions"}, "small": {"/v1/completions"}}
DESK = Desk(leaving=False, running=0, slots=2, waiting_max=4, bodies_bytes=0)


def request(*, model: str = "tiny", body: bytes = b"{}", body_bytes: int | None = None) -> Request:
    return Request(
        attempt_id=AttemptId("a"),
        call_id=CallId("c"),
        gateway_id=GatewayId("g"),
        org_id=OrgId("o"),
        key_id=KeyId("k"),
        path="/v1/chat/completions",
        model=model,
        stream=False,
        body_bytes=len(body) if body_bytes is None else body_bytes,
        body=body,
    )


@pytest.mark.parametrize(
    ("asked", "desk", "code"),
    [
        pytest.param(request(), DESK, None, id="an idle node"),
        pytest.param(request(body=b""), DESK, None, id="an empty body"),
        pytest.param(request(body=b"{", body_bytes=9), DESK, None, id="more of the body follows"),
        pytest.param(request(body_bytes=BODY_BYTES_MAX), DESK, None, id="the largest body"),
        pytest.param(request(), replace(DESK, running=5), None, id="the last place in the queue"),
        pytest.param(request(), replace(DESK, bodies_bytes=BODIES_BYTES_MAX - 2), None, id="the last bytes of room"),
        pytest.param(request(), replace(DESK, leaving=True), "leaving", id="leaving"),
        pytest.param(request(model="huge"), DESK, "model_not_here", id="another model"),
        pytest.param(request(model="small"), DESK, "unknown_path", id="another path"),
        pytest.param(replace(request(), path="/api/delete"), DESK, "unknown_path", id="what the lender does not lend"),
        pytest.param(replace(request(), path="/v1/chat/completions HTTP/1.1\r\nx: y"), DESK, "unknown_path", id="more than a path"),
        pytest.param(request(body_bytes=BODY_BYTES_MAX + 1), DESK, "body_too_large", id="body over the limit"),
        pytest.param(request(body=b"{}", body_bytes=1), DESK, "invalid_request", id="more came than was said"),
        pytest.param(request(body=b"", body_bytes=-1), DESK, "invalid_request", id="less than nothing"),
        pytest.param(request(), replace(DESK, running=6), "busy", id="all places taken"),
        pytest.param(request(), replace(DESK, slots=0, waiting_max=0), "busy", id="no place at all"),
        pytest.param(request(), replace(DESK, bodies_bytes=BODIES_BYTES_MAX - 1), "busy", id="bodies fill the memory"),
        pytest.param(request(model="huge"), replace(DESK, leaving=True), "leaving", id="leaving is said first"),
        pytest.param(
            request(body_bytes=BODY_BYTES_MAX + 1), replace(DESK, running=6), "body_too_large", id="a limit that won't lift is said first"
        ),
    ],
)
def test_admit(asked: Request, desk: Desk, code: str | None) -> None:
    failure = admit(asked, desk, OFFERED)
    assert (failure and failure.code) == code
    assert (failure.retry_after_ms if failure else None) == (BUSY_RETRY_AFTER_MS if code == "busy" else None)


CHEAP = Price(prompt_micro_per_munit=1, output_micro_per_munit=10)
DEAR = Price(prompt_micro_per_munit=2, output_micro_per_munit=20)
MIXED = replace(DEAR, prompt_micro_per_munit=0)


@pytest.mark.parametrize(
    ("digest", "price", "asked", "code"),
    [
        pytest.param("sha256:a", CHEAP, [CHEAP], None, id="what is asked"),
        pytest.param("", Price(), [Price()], None, id="weights that aren't ours, for nothing"),
        pytest.param("sha256:a", DEAR, [CHEAP], None, id="more than is asked by now"),
        pytest.param("sha256:a", CHEAP, [CHEAP, DEAR], None, id="what was asked a moment ago"),
        pytest.param("sha256:a", CHEAP, [DEAR, CHEAP], None, id="in either order"),
        pytest.param("sha256:a", CHEAP, [DEAR], "price_changed", id="less than is asked"),
        pytest.param("sha256:a", MIXED, [CHEAP], "price_changed", id="less of one price only"),
        pytest.param("sha256:a", replace(CHEAP, output_micro_per_munit=9), [CHEAP], "price_changed", id="a little less"),
        pytest.param("sha256:a", DEAR, [], "price_changed", id="nothing is asked: nothing is offered"),
        pytest.param("sha256:b", CHEAP, [CHEAP], "model_not_here", id="other weights"),
        pytest.param("", CHEAP, [CHEAP], "model_not_here", id="weights that aren't named"),
        pytest.param("sha256:b", CHEAP, [DEAR], "model_not_here", id="both: what no retry would lift is said"),
    ],
)
def test_terms(digest: str, price: Price, asked: list[Price], code: str | None) -> None:
    ours = "" if digest == "" and not price.output_micro_per_munit else "sha256:a"
    failure = terms(replace(request(), model_digest=digest, price=price), model_digest=ours, asked=asked)
    assert (failure and failure.code) == code


@PROMISE
@given(
    model=st.sampled_from(["tiny", "huge"]),
    leaving=st.booleans(),
    running=st.integers(0, 8),
    slots=st.integers(0, 4),
    waiting_max=st.integers(0, 4),
    held=st.integers(0, BODIES_BYTES_MAX),
    first=st.binary(max_size=4),
    body_bytes=st.integers(-2, BODY_BYTES_MAX + 2) | st.integers(-1, 5),
)
def test_nothing_is_taken_beyond_a_limit(
    model: str, leaving: bool, running: int, slots: int, waiting_max: int, held: int, first: bytes, body_bytes: int
) -> None:
    desk = Desk(leaving=leaving, running=running, slots=slots, waiting_max=waiting_max, bodies_bytes=held)
    fits = (
        not leaving
        and model == "tiny"
        and len(first) <= body_bytes <= BODY_BYTES_MAX
        and running < slots + waiting_max
        and held + body_bytes <= BODIES_BYTES_MAX
    )
    assert (admit(request(model=model, body=first, body_bytes=body_bytes), desk, OFFERED) is None) == fits


@pytest.mark.parametrize(
    ("calls", "held", "size", "taken"),
    [
        (0, 0, 0, True),
        (GATEWAY_CALLS_MAX - 1, 0, BODY_BYTES_MAX, True),
        (GATEWAY_CALLS_MAX, 0, 0, False),
        (0, GATEWAY_BODIES_BYTES_MAX - 5, 5, True),
        (0, GATEWAY_BODIES_BYTES_MAX - 5, 6, False),
        (GATEWAY_CALLS_MAX, GATEWAY_BODIES_BYTES_MAX, 1, False),
    ],
)
def test_admit_call(calls: int, held: int, size: int, taken: bool) -> None:
    failure = admit_call(calls=calls, bodies_bytes=held, size=size)
    if taken:
        assert failure is None
    else:
        assert failure is not None
        assert (failure.code, failure.retry_after_ms) == ("too_many_calls", GATEWAY_RETRY_AFTER_MS)


@pytest.mark.parametrize(("silent_ms", "abandoned"), [(0, False), (LEASE_MS, False), (LEASE_MS + 1, True)])
def test_is_abandoned(silent_ms: int, abandoned: bool) -> None:
    assert is_abandoned(700, now_ms=700 + silent_ms) is abandoned


def test_the_largest_body_fits_where_bodies_are_held() -> None:
    assert BODY_BYTES_MAX <= BODIES_BYTES_MAX
    assert BODY_BYTES_MAX <= GATEWAY_BODIES_BYTES_MAX


def test_a_long_name_is_not_said_back_in_full() -> None:
    failure = admit(request(model="x" * 10_000), DESK, OFFERED)
    assert failure is not None
    assert len(failure.message) < 400
