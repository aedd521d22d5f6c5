"""The broker's JWTs: what is signed is what was said, and what can't be read is refused."""

import base64
import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.adapters.nkey import make_key
from fallow.model.errors import WireError
from fallow.model.messages import CREDENTIAL_MAX
from fallow.wire import jwt
from fallow.wire.nkey_text import verifies

PROMISE = settings(max_examples=100)
ACCOUNT, USER = make_key("account"), make_key("user")


def opened(text: str) -> tuple[dict[str, Any], dict[str, Any], bytes, bytes]:
    """Head, claims, what was signed, and the signature."""
    parts = [base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in text.split(".")]
    return json.loads(parts[0]), json.loads(parts[1]), text.rpartition(".")[0].encode(), parts[2]


def user(expires_at_s: int | None = 2_000) -> str:
    claims = jwt.user_claims(USER.public, name="node", account="AACC", issued_at_s=1_000, expires_at_s=expires_at_s)
    return jwt.encode(claims, ACCOUNT.public, ACCOUNT.sign)


def test_a_users_jwt_says_who_and_until_when_and_nothing_of_what_it_may() -> None:
    head, claims, signed, signature = opened(user())
    assert head == {"typ": "JWT", "alg": "ed25519-nkey"}
    assert claims.pop("jti")
    assert claims == {
        "sub": USER.public,
        "iss": ACCOUNT.public,
        "name": "node",
        "iat": 1_000,
        "exp": 2_000,
        "nats": {"issuer_account": "AACC", "type": "user", "version": 2},
    }
    assert verifies(ACCOUNT.public, signed, signature)
    assert not verifies(ACCOUNT.public, signed + b"x", signature)
    assert "=" not in user()
    assert len(user()) < CREDENTIAL_MAX / 2


def test_one_without_an_end() -> None:
    assert "exp" not in opened(user(None))[1]
    assert jwt.expiry_of(user(None)) is None
    assert jwt.expiry_of(user()) == 2_000


def test_equal_claims_make_equal_jwts_and_others_don_t() -> None:
    assert user() == user()
    assert opened(user())[1]["jti"] != opened(user(2_001))[1]["jti"]


def test_the_operator_names_the_system_account() -> None:
    key = make_key("operator")
    claims = jwt.operator_claims(key.public, name="fallow", system_account="ASYS", issued_at_s=5)
    said = opened(jwt.encode(claims, key.public, key.sign))[1]
    assert (said["sub"], said["iss"], said["iat"]) == (key.public, key.public, 5)
    assert said["nats"] == {"type": "operator", "version": 2, "system_account": "ASYS"}


def body(**changes: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "exports": [jwt.stream_export("hb.*"), jwt.service_export("hub.key")],
        "imports": [
            jwt.imported("prices", kind="stream", account="AHUB"),
            jwt.imported("hub.enrol", kind="service", account="AHUB", share=True),
        ],
        "connections_max": 7,
        "scopes": [
            jwt.scope(
                "AKEY", role="node", publish=["a"], subscribe=["b"], subscriptions_max=3, payload_bytes_max=9, bearer=False
            )
        ],
        "bearer": False,
        "revoked": {},
    }  # fmt: skip
    return jwt.account_body(**{**usual, **changes})


def test_an_accounts_body() -> None:
    said = body()
    assert said["exports"] == [
        {"name": "hb.*", "subject": "hb.*", "type": "stream"},
        {"name": "hub.key", "subject": "hub.key", "type": "service", "response_type": "Singleton"},
    ]
    assert [one.get("share", False) for one in said["imports"]] == [False, True]
    assert said["limits"]["conn"] == 7
    assert said["limits"]["leaf"] == 0
    assert said["limits"]["disallow_bearer"] is True
    assert body(bearer=True)["limits"]["disallow_bearer"] is False
    assert "revocations" not in said
    assert body(revoked={"UB": 2, "UA": 1})["revocations"] == {"UA": 1, "UB": 2}


def test_a_scope_only_allows() -> None:
    template = body()["signing_keys"][0]["template"]
    assert template["pub"] == {"allow": ["a"]}
    assert template["sub"] == {"allow": ["b"]}
    assert (template["subs"], template["payload"]) == (3, 9)
    assert "deny" not in json.dumps(body())
    assert "bearer_token" not in template


def claims(**changes: Any) -> str:
    said = {"sub": "U", "iss": "A", "iat": 1, "nats": {}, **changes}
    return "e30." + base64.urlsafe_b64encode(json.dumps(said).encode()).rstrip(b"=").decode() + ".x"


BAD = ["", ".", "..", "a.b", "a.b.c", "a.b.c.d", "e30.e30.e30", "ü.ü.ü", "e30.bnVsbA.x", "e30.W10.x", "e30./w.x", "e30.gA.x", "x" * 10]


@pytest.mark.parametrize(
    "text", [*BAD, claims(exp="soon"), claims(exp=1.5), claims(sub=1), claims(nats=None), "e30." + "A" * CREDENTIAL_MAX + ".x"]
)
def test_what_can_t_be_read_is_refused(text: str) -> None:
    with pytest.raises(WireError) as caught:
        jwt.expiry_of(text)
    assert "\n" not in caught.value.message


def test_what_it_doesn_t_know_is_passed_over() -> None:
    assert jwt.expiry_of(claims(exp=9, aud="x", more={"a": [1]})) == 9


@PROMISE
@given(st.text(max_size=80))
def test_any_text_is_read_or_refused(text: str) -> None:
    reads: list[Callable[[str], object]] = [jwt.expiry_of, jwt.claims_of]
    for read in reads:
        for one in (text, f"a.{text}.b"):
            with contextlib.suppress(WireError):
                read(one)


@PROMISE
@given(st.binary(max_size=80))
def test_any_claims_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(WireError):
        jwt.expiry_of("a." + base64.urlsafe_b64encode(data).rstrip(b"=").decode() + ".b")


def test_claims_that_are_no_text_are_refused() -> None:
    data = b'{"sub":"\xff\xfe","iss":"A","iat":1,"nats":{}}'
    with pytest.raises(WireError):
        jwt.claims_of("a." + base64.urlsafe_b64encode(data).rstrip(b"=").decode() + ".b")


def test_claims_that_are_nested_deep_are_refused() -> None:
    deep = b'{"sub":"U","iss":"A","iat":1,"nats":' + b'{"a":' * 900 + b"1" + b"}" * 901
    with pytest.raises(WireError):
        jwt.claims_of("a." + base64.urlsafe_b64encode(deep + b"}" * 5).rstrip(b"=").decode() + ".b")
