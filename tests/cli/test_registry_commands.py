"""`fallow keys`, `fallow org` and `fallow hub invite` with its neighbours: what they print, keep and refuse."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner, Result

from fallow.adapters.nkey import make_key
from fallow.adapters.operator import Operator
from fallow.adapters.sql.registry import SqlRegistry, open_registry
from fallow.apps.hub.key_desk import Agreements
from fallow.apps.hub.refusals import REFUSALS_FILE
from fallow.apps.hub.registrar import digest_of
from fallow.cli import registry_desk
from fallow.cli.main import app
from fallow.model.identity import Member
from fallow.model.ids import GatewayId, KeyId, NodeId, OrgId
from fallow.wire import invitation

ADDRESS = "tls://hub.example:8422"


@pytest.fixture(autouse=True)
def nobodys_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test meets the settings of whoever runs it."""
    for name in [name for name in os.environ if name.startswith("FALLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FALLOW_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result


def complaint(*arguments: str, code: int = 1) -> str:
    """The one line with which a command fails."""
    result = run(*arguments, code=code)
    assert result.stdout == ""
    assert result.stderr.startswith("fallow: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def told(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


@contextmanager
def registry(folder: Path) -> Iterator[SqlRegistry]:
    opened = open_registry(f"sqlite:///{folder / 'hub.db'}")
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


# keys
def test_a_keys_secret_is_shown_once_and_alone(data: Path) -> None:
    made = run("keys", "create", "--name", "app")
    secret = made.stdout.strip()
    assert secret.startswith("fk-")
    assert len(secret) == 51
    assert made.stdout == secret + "\n"
    assert secret not in made.stderr
    with registry(data) as kept:
        key = kept.keys.find(digest_of(secret))
        assert key is not None
        assert (key.name, key.org_id, key.role) == ("app", "home", "caller")
    for shown in (run("keys", "list").output, run("keys", "show", key.id).output, json.dumps(told("keys", "show", key.id))):
        assert key.id in shown
        assert secret not in shown
        assert digest_of(secret).hex() not in shown
    assert secret.encode() not in (data / "hub.db").read_bytes()


LIMITS: dict[str, tuple[str, str, object]] = {
    "--rings": ("own,market", "rings", ["market", "own"]),
    "--partners": ("acme", "partners", ["acme"]),
    "--regions": ("eu-de, eu-at", "regions", ["eu-at", "eu-de"]),
    "--countries": ("de", "countries", ["de"]),
    "--hardware": ("gpu", "hardware", "gpu"),
    "--isolation": ("bwrap", "isolation", "bwrap"),
    "--prefer": ("fast", "prefer", "fast"),
    "--privacy": ("padded", "privacy", "padded"),
    "--max-cost": ("0.29", "cost_max_micro", 290_000),
    "--max-price": ("2", "price_max_micro_per_munit", 2_000_000),
    "--concurrency": ("3", "concurrency_max", 3),
    "--calls-per-minute": ("60", "calls_per_minute", 60),
    "--tokens-per-minute": ("600", "tokens_per_minute", 600),
    "--weight": ("2.5", "weight", 2.5),
    "--models": ("tiny,large", "models", ["large", "tiny"]),
    "--budget": ("2.5", "budget_micro", 2_500_000),
}
LIFTS: dict[str, tuple[str, object]] = {
    "--partners": ("", []),
    "--regions": ("", []),
    "--countries": ("", []),
    "--hardware": ("", None),
    "--isolation": ("none", None),
    "--max-cost": ("0", None),
    "--max-price": ("0", None),
    "--calls-per-minute": ("0", 0),
    "--models": ("", []),
    "--budget": ("0", None),
}


def flat(document: dict[str, Any]) -> dict[str, Any]:
    policy, allowance = document.pop("policy"), document.pop("allowance")
    return {**document, **policy, **allowance}


def test_every_limit_is_set_changed_alone_and_lifted() -> None:
    every = [word for flag, (text, _, _) in LIMITS.items() for word in (flag, text)]
    made = told("keys", "create", *every)["id"]
    limited = flat(told("keys", "show", made))
    assert {field: limited[field] for _, field, _ in LIMITS.values()} == {field: value for _, field, value in LIMITS.values()}
    assert flat(told("keys", "limit", made, "--weight", "1")) == limited | {"weight": 1.0}, "what isn't named stays"
    lifted = flat(told("keys", "limit", made, *(word for flag, (text, _) in LIFTS.items() for word in (flag, text))))
    assert lifted == limited | {"weight": 1.0} | {LIMITS[flag][1]: free for flag, (_, free) in LIFTS.items()}
    assert flat(told("keys", "show", made)) == lifted


WRONG = [
    ("--rings", "nowhere", "own, partner, market"),
    ("--rings", "", "--rings"),
    ("--regions", "a b", "--regions"),
    ("--countries", "Germany", "--countries"),
    ("--hardware", "tpu", "--hardware"),
    ("--isolation", "strong", "none, landlock, bwrap"),
    ("--privacy", "total", "plain, padded, whole"),
    ("--calls-per-minute", "-1", "--calls-per-minute"),
    ("--concurrency", "0", "--concurrency"),
    ("--weight", "0", "--weight"),
    ("--budget", "-1", "--budget"),
    ("--expires", "soon", "90m, 12h or 30d"),
    ("--expires", "99999d", "ten years"),
    ("--models", ",".join(f"m{n}" for n in range(65)), "--models"),
]


def test_a_wrong_limit_is_refused_by_name_and_nothing_is_made() -> None:
    for flag, text, said in WRONG:
        assert said in complaint("keys", "create", flag, text, code=2)
    assert told("keys", "list", "--all") == []


def test_more_than_gateways_can_be_told_is_refused(data: Path) -> None:
    models = ",".join(f"model-{n:02}-{'x' * 180}" for n in range(60))
    assert "the limit is 8192" in complaint("keys", "create", "--models", models, code=2)


def test_a_key_of_another_organisation_and_role() -> None:
    assert "there is no organisation acme" in complaint("keys", "create", "--org", "acme")
    run("org", "add", "acme")
    made = told("keys", "create", "--org", "acme", "--role", "operator")["id"]
    shown = told("keys", "show", made)
    assert (shown["org_id"], shown["role"]) == ("acme", "operator")
    assert "caller, lender, operator" in complaint("keys", "create", "--role", "king", code=2)


def test_expiry_is_set_and_taken_back() -> None:
    made = told("keys", "create", "--expires", "30d")["id"]
    assert told("keys", "show", made)["expires_at"] is not None
    assert told("keys", "limit", made, "--expires", "never")["expires_at"] is None


def test_rotating_gives_a_key_with_the_same_limits_and_ends_the_old_one(data: Path) -> None:
    made = told("keys", "create", "--models", "tiny", "--name", "app")["id"]
    rotated = told("keys", "rotate", made, "--grace", "1h")
    old, new = told("keys", "show", made), told("keys", "show", rotated["id"])
    assert old["expires_at"] is not None
    assert (new["models"], new["name"], new["expires_at"]) == (["tiny"], "app", None)
    with registry(data) as kept:
        assert kept.keys.find(digest_of(rotated["secret"])) == kept.keys.named(KeyId(rotated["id"]))
    at_once = told("keys", "rotate", rotated["id"], "--grace", "0")
    assert told("keys", "show", rotated["id"])["state"] == "expired"
    assert "can't be used any more" in complaint("keys", "rotate", rotated["id"], code=2)
    assert told("keys", "show", at_once["id"])["state"] == "good"
    assert "--grace" in complaint("keys", "rotate", at_once["id"], "--grace", "never", code=2)


def test_a_revoked_key_stays_revoked() -> None:
    one, other = (told("keys", "create")["id"] for _ in range(2))
    assert "no key nope" in complaint("keys", "revoke", one, "nope")
    assert told("keys", "show", one)["state"] == "good", "all, or none if one is mistyped"
    run("keys", "revoke", one, other)
    run("keys", "revoke", one)
    assert "stays so" in complaint("keys", "limit", one, "--weight", "2", code=2)
    assert told("keys", "list") == []
    assert {row["id"] for row in told("keys", "list", "--all")} == {one, other}


def test_what_a_key_has_spent_is_listed_beside_its_budget(data: Path) -> None:
    made, spent_up, other = (told("keys", "create", *flags)["id"] for flags in (("--budget", "2.5"), ("--budget", "1"), ()))
    with registry(data) as kept:
        kept.spending.tell(GatewayId("gw-1"), 1, {KeyId(made): 1_250_000, KeyId(spent_up): 1})
        kept.spending.tell(GatewayId("gw-2"), 1, {KeyId(made): 250_001})
    assert {row["id"]: row["spent_micro"] for row in told("keys", "list")} == {made: 1_500_001, spent_up: 1, other: 0}
    rows = {line.split()[0]: line for line in run("keys", "list").stdout.splitlines()[1:] if line.strip()}
    assert "1.500001  budget 2.5" in rows[made]
    assert "0.000001  budget 1" in rows[spent_up]
    assert rows[other].split()[-2:] == ["never", "none"], "nobody counts"
    shown = run("keys", "show", made).stdout
    assert "spent           1.500001\n" in shown
    assert told("keys", "limit", made, "--budget", "0")["spent_micro"] == 1_500_001, "it stays when the limit is lifted"
    assert "spent" not in run("keys", "show", other).stdout


def test_limit_wants_to_know_which() -> None:
    made = told("keys", "create")["id"]
    assert "--calls-per-minute 60" in complaint("keys", "limit", made, code=2)


# organisations
def other_machine(folder: Path, name: str) -> str:
    """The data folder of a machine of another organisation."""
    folder.mkdir(parents=True)
    (folder / "settings.toml").write_text(f'[organisation]\nid = "{name}"\n')
    return str(folder)


def partners(folder: Path, name: str) -> list[str]:
    return next(one["partners"] for one in told("org", "list", "--data", str(folder)) if one["id"] == name)


def test_two_lines_of_text_make_partners_on_both_hubs(data: Path, tmp_path: Path) -> None:
    acme = other_machine(tmp_path / "acme", "acme")
    for folder in (str(data), acme):
        told("keys", "create", "--data", folder)  # so that there is a hub
    first = run("org", "agree", "acme")
    assert first.stdout.count("\n") == 1
    second = run("org", "countersign", first.stdout.strip(), "--data", acme)
    assert run("org", "key").stdout.strip() in second.stderr, "whose line it is can be compared"
    assert partners(tmp_path / "acme", "acme") == ["home"]
    third = run("org", "countersign", second.stdout.strip())
    assert third.stdout == ""
    assert partners(data, "home") == ["acme"]
    run("org", "countersign", second.stdout.strip())
    assert len(told("org", "agreements")) == 1, "doing it again changes nothing"
    with registry(data) as kept:
        assert len(Agreements(kept).signed()) == 1


def test_a_hub_of_neither_keeps_what_two_have_signed(data: Path, tmp_path: Path) -> None:
    acme, zoo = other_machine(tmp_path / "acme", "acme"), other_machine(tmp_path / "zoo", "zoo")
    first = run("org", "agree", "zoo", "--data", acme).stdout.strip()
    second = run("org", "countersign", first, "--data", zoo).stdout.strip()
    assert not (tmp_path / "zoo" / "hub.db").exists(), "no hub is there"
    assert "both organisations must sign" in complaint("org", "keep", first)
    assert "between acme and zoo" in complaint("org", "countersign", second)
    run("org", "keep", second)
    assert partners(data, "zoo") == ["acme"]


def test_an_ended_agreement_is_not_brought_back_by_its_old_line(data: Path, tmp_path: Path) -> None:
    acme = other_machine(tmp_path / "acme", "acme")
    told("keys", "create")
    line = run("org", "countersign", run("org", "agree", "acme").stdout.strip(), "--data", acme).stdout.strip()
    run("org", "countersign", line)
    run("org", "end", "acme")
    assert partners(data, "home") == []
    assert told("org", "agreements")[0]["state"] == "ended"
    assert "was ended" in run("org", "countersign", line, code=1).stderr
    assert partners(data, "home") == []
    anew = run("org", "countersign", run("org", "agree", "acme").stdout.strip(), "--data", acme).stdout.strip()
    run("org", "countersign", anew)
    assert partners(data, "home") == ["acme"]
    assert "no agreement" in complaint("org", "end", "other")


def test_somebody_elses_key_does_not_take_a_name(data: Path, tmp_path: Path) -> None:
    run("org", "add", "acme", "--key", make_key("account").public)
    impostor = other_machine(tmp_path / "impostor", "acme")
    line = run("org", "countersign", run("org", "agree", "acme").stdout.strip(), "--data", impostor).stdout.strip()
    assert "another name has to be chosen" in run("org", "countersign", line, code=1).stderr
    assert partners(data, "home") == []


def test_a_line_signed_for_us_by_another_is_refused(tmp_path: Path) -> None:
    acme, impostor = other_machine(tmp_path / "acme", "acme"), other_machine(tmp_path / "impostor", "home")
    line = run("org", "countersign", run("org", "agree", "acme", "--data", impostor).stdout.strip(), "--data", acme).stdout.strip()
    assert "isn't from you" in complaint("org", "countersign", line)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["agree", "home"], "of home itself"),
        (["agree", "a b"], "letters, digits"),
        (["add", "a b"], "can't be an organisation's name"),
        (["add", "acme", "--key", "A123"], "not a public key"),
        (["add", "acme", "--key", make_key("user").public], "not a public key"),
    ],
)
def test_what_is_no_name_or_key_is_refused(words: list[str], said: str) -> None:
    assert said in complaint("org", *words, code=2)


def test_an_own_line_is_not_countersigned() -> None:
    assert "your own line" in complaint("org", "countersign", run("org", "agree", "acme").stdout.strip())


def test_names_are_taken_once() -> None:
    run("org", "add", "acme")
    assert "acme already" in complaint("org", "add", "acme")


# who may join
def test_an_invitation_says_all_that_is_needed_and_keeps_no_word(data: Path) -> None:
    made = run("hub", "invite", "--address", ADDRESS, "--address", "wss://hub.example/broker", "--uses", "3")
    token = made.stdout.strip()
    assert made.stdout == token + "\n"
    said = invitation.read(token)
    assert said.addresses == (ADDRESS, "wss://hub.example/broker")
    assert said.door_jwt.startswith("ey")
    assert said.door_seed.startswith("SU")
    with registry(data) as kept:
        [invite] = kept.members.invites()
        assert (invite.word_digest, invite.uses_left, invite.roles) == (digest_of(said.word), 3, frozenset({"node"}))
    assert said.word.encode() not in (data / "hub.db").read_bytes()
    assert said.word not in run("hub", "invites").output


def test_the_running_hub_says_where_it_is(data: Path) -> None:
    assert "no hub runs here" in complaint("hub", "invite")
    (data / "hub.json").write_text(json.dumps({"addresses": [ADDRESS], "more": 1}))
    assert invitation.read(run("hub", "invite").stdout).addresses == (ADDRESS,)
    (data / "hub.json").write_text("nonsense")
    assert "no hub runs here" in complaint("hub", "invite")


@pytest.mark.parametrize(
    "words",
    [
        ["--uses", "0"],
        ["--uses", "many"],
        ["--role", "hub"],
        ["--expires", "soon"],
        ["--address", "http://x"],
        ["--address", "nats://u:p@x"],
    ],
)
def test_a_wrong_invitation_is_not_made(words: list[str]) -> None:
    complaint("hub", "invite", *([] if "--address" in words else ["--address", ADDRESS]), *words, code=2)
    assert told("hub", "invites", "--all") == []


def test_invitations_are_listed_and_ended() -> None:
    made = told("hub", "invite", "--address", ADDRESS, "--role", "node", "--role", "gateway", "--uses", "any", "--expires", "never")
    [row] = told("hub", "invites")
    assert (row["id"], row["roles"], row["uses_left"], row["expires_at"]) == (made["id"], ["gateway", "node"], None, None)
    run("hub", "invites", "--end", made["id"])
    assert told("hub", "invites") == []
    assert told("hub", "invites", "--all")[0]["state"] == "ended"
    assert "no invitation nope" in complaint("hub", "invites", "--end", "nope")


def joined(data: Path, count: int = 1) -> list[str]:
    """Members that joined by an open door."""
    names = sorted(make_key("user").public for _ in range(count))
    run("org", "list")
    with registry(data) as kept:
        for name in names:
            kept.members.admit_open(Member(public_key=name, role="node", org_id=OrgId("home"), joined_at_ms=5))
    return names


def test_members_are_banned_by_the_beginning_of_their_key(data: Path) -> None:
    [name] = joined(data)
    assert name in run("hub", "members").output
    run("hub", "ban", name[:10], "--why", "wrong answers")
    [row] = told("hub", "members")
    assert (row["public_key"], row["banned_why"]) == (name, "wrong answers")
    assert row["banned_at"] is not None
    run("hub", "unban", name)
    assert told("hub", "members")[0]["banned_at"] is None


def test_a_ban_says_that_it_waits_for_the_operators_key(data: Path, tmp_path: Path) -> None:
    [name] = joined(data)
    run("hub", "init", "--offline", str(tmp_path / "safe"))
    banned = run("hub", "ban", name)
    assert f"{name} gets no new credential" in banned.stdout
    assert "operator.seed" in banned.stderr
    assert "operator.seed" in run("hub", "unban", name).stderr
    (tmp_path / "safe" / "operator.seed").rename(data / "hub" / "keys" / "operator.seed")
    again = run("hub", "ban", name)
    assert f"{name} is out" in again.stdout
    assert again.stderr == ""


def test_refusals_are_listed_the_latest_first(data: Path) -> None:
    assert "nothing was refused yet" in run("hub", "refusals").output
    assert told("hub", "refusals") == []
    path = data / REFUSALS_FILE
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps(
            [
                {"what": "login", "reason": "foreign", "count": 3, "first_at_ms": 0, "last_at_ms": 1_000},
                {"what": "joining", "reason": "not_invited", "count": 12, "first_at_ms": 0, "last_at_ms": 2_000},
                {"what": "moon", "reason": "new", "count": 1, "first_at_ms": 0, "last_at_ms": 0},
            ]
        )
    )
    rows = told("hub", "refusals")
    assert [(row["what"], row["reason"], row["count"]) for row in rows] == [
        ("joining", "not_invited", 12),
        ("login", "foreign", 3),
        ("moon", "new", 1),
    ]
    assert rows[1]["why"] == "the credential isn't one of this hub"
    assert (rows[1]["first_at"], rows[1]["last_at"]) == ("1970-01-01T00:00:00+00:00", "1970-01-01T00:00:01+00:00")
    shown = run("hub", "refusals").stdout
    assert shown.index("not_invited") < shown.index("foreign")
    assert "the credential isn't one of this hub" in shown
    path.write_text("nonsense")
    assert "delete it" in complaint("hub", "refusals")


def test_a_beginning_that_could_be_two_bans_nobody(data: Path) -> None:
    joined(data, 2)
    assert "6 characters" in complaint("hub", "ban", "U")
    assert "no member begins" in complaint("hub", "ban", "UNOBODY")
    with registry(data) as kept:
        for tail in "AB":
            member = Member(public_key="UTWINS" + tail * 50, role="node", org_id=OrgId("home"), joined_at_ms=5)
            kept.members.admit_open(member)
    assert "2 members begin" in complaint("hub", "ban", "UTWINS")
    assert all(row["banned_at"] is None for row in told("hub", "members"))


def test_the_log_is_shown_and_checked(data: Path) -> None:
    run("org", "list")
    with registry(data) as kept:
        for number in range(5):
            kept.cards.append(NodeId(f"U{number % 2}"), b"card %d" % number, at_ms=number)
    assert [row["number"] for row in told("hub", "log", "--lines", "2")] == [4, 5]
    assert [row["number"] for row in told("hub", "log", "--node", "U1")] == [2, 4]
    assert "5 cards in all" in run("hub", "log").stderr
    engine = sa.create_engine(f"sqlite:///{data / 'hub.db'}")
    with engine.begin() as connection:
        for name in connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'trigger'").scalars().all():
            connection.exec_driver_sql(f"DROP TRIGGER {name}")  # what keeps others from doing this
        connection.exec_driver_sql("UPDATE card_log SET card = X'00' WHERE number = 3")
    engine.dispose()
    assert "entry 3" in complaint("hub", "log")


def test_the_data_folder_may_stand_before_or_after(tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    told("keys", "create", "--data", other)
    run("hub", "--data", other, "invite", "--address", ADDRESS)
    assert len(json.loads(run("hub", "invites", "--json", "--data", other).stdout)) == 1
    assert told("hub", "invites") == []


def test_a_database_elsewhere_is_used(data: Path, tmp_path: Path) -> None:
    data.mkdir()
    (data / "settings.toml").write_text(f'[hub]\ndatabase = "sqlite:///{tmp_path / "elsewhere.db"}"\n')
    told("keys", "create")
    assert (tmp_path / "elsewhere.db").exists()
    assert not (data / "hub.db").exists()


def test_a_database_that_can_not_be_is_one_line(data: Path) -> None:
    data.mkdir()
    (data / "settings.toml").write_text('[hub]\ndatabase = "mysql://user:secret@host/name"\n')
    assert "secret" not in complaint("keys", "list")


@pytest.mark.parametrize(("text", "ms"), [("90m", 5_400_000), ("12h", 43_200_000), ("30d", 2_592_000_000), ("1s", 1_000), ("never", None)])
def test_spans(text: str, ms: int | None) -> None:
    assert registry_desk.span_ms("expires", text) == ms


def test_a_hub_is_made_before_it_runs_and_its_first_keys_kept_elsewhere(data: Path, tmp_path: Path) -> None:
    folder = Path(run("hub", "init", "--offline", str(tmp_path / "safe")).stdout.strip())
    assert folder == data / "hub" / "keys"
    assert {path.name for path in (tmp_path / "safe").iterdir()} == {
        "operator.seed", "account-GATEWAYS.seed", "account-GUESTS.seed", "account-HUB.seed", "account-NODES.seed", "account-SYSTEM.seed",
    }  # fmt: skip
    assert not list(folder.glob("operator.seed"))
    operator, key = Operator.open(folder), make_key("user").public
    assert operator.credential("node", key, now_s=1, life_s=2)
    assert operator.trust({key: 1}, now_s=2).unsigned == {key}
    assert json.loads(run("keys", "list", "--json").stdout)[0]["name"] == "this machine"
    before = operator.authority
    run("hub", "init")
    assert Operator.open(folder).authority == before
