"""Who is who, with real processes: joining and being put out, organisations and partners, API keys, and hubs that come and go."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from running import FALLOW, Apart, Running, Service, fallow, node_id_of, until
from test_rolling import END_S, MODEL, ROOT, Long, free_port, say
from test_rolling import Site as Rolling
from trusted import connections

from fallow.adapters.clock import SystemClock
from fallow.adapters.nats_bus import NatsBus
from fallow.apps.joining import Joined, join, read_invitation
from fallow.apps.node.attached import attach
from fallow.apps.node.node import Node
from fallow.apps.node.seals import vouched_by
from fallow.apps.settings import load
from fallow.core.cards import CARD_LIFE_MS, REASONS
from fallow.model.card import Card
from fallow.model.ids import NodeId, OrgId
from fallow.wire.jwt import expiry_of

IN_FORCE_S = 2.0
"""What is promised of a change of keys and agreements, at every gateway."""
OUT_S = 2.0
"""A ban takes a second; the rest is for polling on a busy machine."""
GONE_S = 10.0
"""A gateway forgets a node that it hears no more."""
SHORT = {"chunks": "2", "interval_ms": "0"}
LIFE_S = 6
STREAM = {"chunks": "150", "interval_ms": "100"}
"""Fifteen seconds: three credentials."""
OWN_AND_PARTNER = ("--rings", "own,partner")
FEW = '[lend]\nmeasure = false\nprofile = "dedicated"\n'


def told(*arguments: str) -> str:
    """What a command that works prints."""
    done = fallow(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# a hub with its own broker, and credentials that are short-lived
class Fleeting(Apart):
    """A hub whose credentials live some seconds, a gateway, and a node."""

    hub_flags: tuple[str, ...] = ("--credential-life", str(LIFE_S))

    def begin(self) -> Service:
        data = self.folder / "hub"
        data.mkdir()
        (data / "settings.toml").write_text('[organisation]\ncountry = "de"\n')
        self.hub_address = f"nats://127.0.0.1:{free_port()}"
        self.start_hub()
        invited = ("--join-file", str(data / "invitation"))
        self.parts["gateway"] = Running(self.folder / "gateway", "gateway", "--port", "0", "--verbose", *invited)
        engine = subprocess.Popen([sys.executable, "-m", "bench.stub_engine"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.stub = engine
        assert engine.stdout is not None
        self.lend("node", "--engine", engine.stdout.readline().decode().split()[1] + "/v1", "--slots", "4", "--verbose")
        address = self.folder / "gateway" / "gateway.json"
        until(address.exists, what="the gateway")
        base_url = msgspec.json.decode(address.read_bytes(), type=dict[str, str])["base_url"]
        service = Service(base_url, (data / "key").read_text().strip(), self.parts)
        until(lambda: "ready" in service.readiness().values(), what="the node")
        return service

    def start_hub(self) -> None:
        self.parts["hub"] = Running(self.folder / "hub", "hub", "--listen", self.hub_address.removeprefix("nats://"), *self.hub_flags)
        until(lambda: "The hub is up" in self.parts["hub"].said() or self.parts["hub"].process.poll() is not None, what="the hub")
        assert self.parts["hub"].process.poll() is None, self.parts["hub"].said()

    def expires_at_s(self, role: str) -> int:
        """When the credential ends that a part keeps."""
        kept = msgspec.json.decode((self.folder / role / "identity" / f"{role}.json").read_bytes())
        found = expiry_of(kept["credential"])
        assert found is not None
        return found

    def stop(self) -> None:
        super().stop()
        self.stub.kill()
        self.stub.communicate()


class Streamed(threading.Thread):
    """A long answer that comes while the other tests run, and when the credentials ended with which it began."""

    def __init__(self, parts: Fleeting, service: Service) -> None:
        super().__init__(daemon=True)
        self.parts, self.service = parts, service
        self.expired_s = {role: parts.expires_at_s(role) for role in ("node", "gateway")}
        self.failed = "it didn't end"
        self.start()

    def run(self) -> None:
        try:
            with self.service.client() as client:
                say(client, STREAM)
        except (openai.OpenAIError, AssertionError) as error:
            self.failed = f"{type(error).__name__}: {error}"
        else:
            self.failed = ""


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Streamed]:
    parts = Fleeting(tmp_path_factory.mktemp("fleeting"))
    try:
        yield Streamed(parts, parts.begin())
    finally:
        parts.stop()


# a hub with a broker that stays
class Site(Rolling):
    """A broker that stays, a hub, two gateways, two nodes of `home`; and what commands at the hub do."""

    @property
    def hub(self) -> Path:
        return self.folder / "hub"

    @property
    def engine(self) -> str:
        """The server that all nodes lend."""
        command: Any = self.parts["node1"].process.args
        return str(command[command.index("--engine") + 1])

    def at_hub(self, *arguments: str) -> str:
        return told(*arguments, "--data", str(self.hub))

    def key(self, *limits: str) -> tuple[str, str]:
        """A new API key: its id and secret."""
        made = msgspec.json.decode(self.at_hub("keys", "create", *limits, "--json"))
        return made["id"], made["secret"]

    def token(self, *flags: str) -> str:
        return self.at_hub("hub", "invite", *flags)

    def folder_of(self, name: str, more: str = "") -> Path:
        data = self.folder / name
        data.mkdir()
        (data / "settings.toml").write_text(FEW + more)
        return data

    def with_key(self, secret: str) -> list[Service]:
        """Both gateways, asked with this key."""
        return [Service(one.base_url, secret, one.parts) for one in self.services]


@pytest.fixture(scope="module")
def site(streamed: Streamed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    running = Site(tmp_path_factory.mktemp("identity"))
    try:
        running.start()
        yield running
    finally:
        running.stop()


def code_of(service: Service, **options: Any) -> str:
    """What becomes of a short call: `ok`, or the code of the refusal."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "metadata": SHORT, **options}
    answer = service.post(body)
    return "ok" if answer.status_code == 200 else str(answer.json()["error"]["code"])


def node_of(service: Service, **options: Any) -> str:
    """The node that answers a short call; empty if it is refused."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "metadata": SHORT, **options}
    return str(service.post(body).headers.get("fallow-node", ""))


def everywhere(services: list[Service], said: Callable[[Service], bool], *, what: str, within_s: float = IN_FORCE_S) -> None:
    """Both gateways say so in time."""
    until(lambda: all(said(one) for one in services), within_s=within_s, what=what)


def org_of(service: Service, node_id: str) -> str:
    return next((str(node["org_id"]) for node in service.nodes() if node["node_id"] == node_id), "")


# organisations
def test_a_partners_machine_is_used_while_the_agreement_lasts(site: Site) -> None:
    acme = site.folder_of("acme", '[organisation]\nid = "acme"\n')
    site.at_hub("org", "add", "acme", "--key", told("org", "key", "--data", str(acme)))
    used_once = site.token("--org", "acme")
    site.parts["acme"] = Running(acme, "lend", "--join", used_once, "--engine", site.engine, "--slots", "4")
    node_id = node_id_of(acme)
    everywhere(site.services, lambda one: org_of(one, node_id) == "acme", what="acme's machine", within_s=END_S)
    services = site.with_key(site.key(*OWN_AND_PARTNER)[1])
    partners_only = {"fallow": {"rings": ["partner"]}}
    for one in services:
        assert node_of(one) not in ("", node_id)
        assert code_of(one, **partners_only) != "ok", "nobody's partner yet"

    theirs = told("org", "agree", "home", "--data", str(acme))
    ours = site.at_hub("org", "countersign", theirs)
    everywhere(services, lambda one: node_of(one, **partners_only) == node_id, what="a call at the partner's")
    assert told("org", "countersign", ours, "--data", str(acme)) == "", "both have signed; there is no hub to keep it"

    site.at_hub("org", "end", "acme")
    everywhere(services, lambda one: code_of(one, **partners_only) != "ok", what="the end of the agreement")
    for one in services:
        assert node_of(one) not in ("", node_id)
    refused = fallow("lend", "--join", used_once, "--engine", site.engine, "--data", str(site.folder_of("late")))
    assert_told_shortly(refused, used_once, "this invitation doesn't let you in")


class Elsewhere(threading.Thread):
    """A node in this process, of whose card we decide."""

    def __init__(self, site: Site, joined: Joined, data: Path, **claims: Any) -> None:
        super().__init__(daemon=True)
        self.joined, self.data, self.claims = joined, data, claims
        self.engine = site.engine
        self.calls = 0
        self.stop = threading.Event()
        self.start()

    def run(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        clock, joined = SystemClock(), self.joined
        found = await attach(self.engine, load(self.data, {"node.slots": 4}))
        bus = NatsBus(joined.address, joined.credentials, "elsewhere", reach=joined.reach)
        await bus.connect()
        now = clock.wall_ms()
        said: dict[str, Any] = {"org_id": joined.org_id, "membership": joined.membership, "member_until_s": joined.member_until_s}
        card = Card(
            node_id=NodeId(joined.credentials.key.public),
            sequence=now,
            expires_at_ms=now + CARD_LIFE_MS,
            hardware=found.hardware,
            isolation="none",
            region="unknown",
            serves=frozenset({"own", "partner", "market"}),
            **{**said, **self.claims},
        )
        node = Node(card, found.served, bus, clock, joined.credentials.key.sign, vouched_by(joined.authority, joined.hub_org_id, clock))
        until_told = asyncio.Event()
        running = asyncio.ensure_future(node.run(until_told))
        while not self.stop.is_set():
            self.calls += len(node.jobs)
            await asyncio.sleep(0.01)
        until_told.set()
        await running
        await bus.close()


def refused_cards(service: Service, reason: str) -> float:
    name = f'fallow_cards_refused_total{{reason="{reason}"}} '
    return next(float(line.removeprefix(name)) for line in service.get("/metrics").text.splitlines() if line.startswith(name))


@pytest.mark.parametrize("is_forged", [True, False], ids=["another's", "its-own"])
def test_who_claims_another_organisation_gets_no_call(site: Site, is_forged: bool) -> None:
    name = f"claims{is_forged:d}"
    if is_forged:
        site.at_hub("org", "add", name)
        invited = read_invitation(site.token("--org", name), "the test")
    else:
        invited = read_invitation(site.token(), "the test")
    data = site.folder_of(name)
    joined = asyncio.run(join(data, "node", invited, "", "", SystemClock()))
    before = [refused_cards(one, "organisation") for one in site.services]
    node = Elsewhere(site, joined, data, org_id=OrgId("home"))
    try:
        if is_forged:
            until(lambda: [refused_cards(one, "organisation") for one in site.services] > before, what="the refusal")
            assert all(org_of(one, str(joined.credentials.key.public)) == "" for one in site.services)
            for _ in range(8):
                assert node_of(site.services[0]) not in ("", joined.credentials.key.public)
            assert node.calls == 0
        else:
            everywhere(site.services, lambda one: org_of(one, joined.credentials.key.public) == "home", what="the node", within_s=END_S)
            assert [refused_cards(one, "organisation") for one in site.services] == before
    finally:
        node.stop.set()
        node.join(END_S)
    assert not node.is_alive()


# who is let in, and put out
def assert_told_shortly(done: "subprocess.CompletedProcess[str]", token: str, words: str) -> None:
    """One line, which gives nothing of the token away."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert not any(token[at : at + 12] in done.stderr for at in range(len("fallow1-"), len(token) - 12))


def test_tokens_that_are_no_good_are_told_in_a_line(site: Site) -> None:
    ended = msgspec.json.decode(site.at_hub("hub", "invite", "--json"))
    site.at_hub("hub", "invites", "--end", ended["id"])
    expired = msgspec.json.decode(site.at_hub("hub", "invite", "--expires", "1s", "--json"))

    def has_expired() -> bool:
        listed = msgspec.json.decode(site.at_hub("hub", "invites", "--all", "--json"))
        return any((one["id"], one["state"]) == (expired["id"], "expired") for one in listed)

    until(has_expired, what="the end of the invitation")
    good = ended["token"]
    tokens = [
        (ended["token"], "used up, expired or ended"),
        (expired["token"], "used up, expired or ended"),
        (good[:50] + ("A" if good[50] != "A" else "B") + good[51:], "--join holds no invitation"),
    ]
    for number, (token, words) in enumerate(tokens):
        data = site.folder_of(f"refused{number}")
        assert_told_shortly(fallow("lend", "--join", token, "--engine", site.engine, "--data", str(data)), token, words)
        assert not (data / "identity" / "node.json").exists()


def test_a_token_in_a_file_is_not_seen_by_others(site: Site) -> None:
    token = (site.hub / "invitation").read_text().strip()
    for part in site.parts.values():
        for process in part.family():
            seen = " ".join(process.cmdline())
            assert token[20:60] not in seen
            assert "fallow1-" not in seen or part is site.parts.get("acme"), "that one was given it on its command line"
    assert "--join-file" in " ".join(site.parts["node1"].family()[0].cmdline())


def test_a_ban_puts_a_node_out_at_once_and_its_stream_goes_on_elsewhere(site: Site) -> None:
    long = Long(site.services[0]).begun()
    banned = long.headers["fallow-node"]
    name = next(name for name in ("node1", "node2") if node_id_of(site.folder / name) == banned)
    heard = f"{banned} was banned"
    site.at_hub("hub", "ban", banned, "--why", heard)
    until(lambda: not is_connected(site, banned), within_s=OUT_S, what="the end of its connection")
    assert long.is_whole(), long.failed
    attempts = site.services[0].get(f"/v1/calls/{long.headers['fallow-call']}").json()["attempts"]
    assert [attempt["node"] == banned for attempt in attempts] == [True, False]
    for one in site.services:
        for _ in range(4):
            assert node_of(one) not in ("", banned)
    everywhere(site.services, lambda one: org_of(one, banned) == "", what="the word that it is gone", within_s=GONE_S)

    part = site.parts[name]
    part.stop()
    command: Any = part.process.args
    again = subprocess.run(command, capture_output=True, text=True, timeout=END_S)
    assert (again.returncode, again.stdout, again.stderr.count("\n")) == (1, "", 1), again.stderr
    (part.data / "identity" / "node.json").unlink()
    anew = subprocess.run(command, capture_output=True, text=True, timeout=END_S)
    assert (anew.returncode, anew.stderr.count("\n")) == (1, 1)
    assert "this key was put out" in anew.stderr
    assert heard not in anew.stderr

    site.at_hub("hub", "unban", banned)
    until(lambda: comes_back(site, name), what="who was taken back")
    everywhere(site.services, lambda one: org_of(one, banned) == "home", what="the node", within_s=END_S)


def is_connected(site: Site, node_id: str) -> bool:
    """Whether the node still holds a connection to the broker."""
    return node_id in asyncio.run(connections(site.hub_address, site.hub / "hub" / "keys"))


def comes_back(site: Site, name: str) -> bool:
    """Started again, it runs; the hub may still be telling the broker."""
    before: Any = site.parts[name].process.args
    site.parts[name] = Running(site.parts[name].data, *before[len(FALLOW) : -2])
    part = site.parts[name]
    until(lambda: "Lending" in part.said() or part.process.poll() is not None, within_s=END_S, what=name)
    return part.process.poll() is None


# API keys
def test_keys_are_in_force_at_every_gateway_and_outlive_the_hub(site: Site) -> None:
    id, secret = site.key("--name", "app")
    services = site.with_key(secret)
    everywhere(services, lambda one: code_of(one) == "ok", what="the new key")
    site.at_hub("keys", "limit", id, "--models", "another")
    everywhere(services, lambda one: code_of(one) == "model_not_allowed", what="its limit")
    site.at_hub("keys", "limit", id, "--models", "")
    everywhere(services, lambda one: code_of(one) == "ok", what="its end")
    rotated = msgspec.json.decode(site.at_hub("keys", "rotate", id, "--grace", "0", "--json"))
    after = site.with_key(rotated["secret"])
    everywhere(after, lambda one: code_of(one) == "ok", what="the key that replaces it")
    everywhere(services, lambda one: code_of(one) == "invalid_api_key", what="the end of the old one")
    kept = site.with_key(site.key()[1])
    everywhere(kept, lambda one: code_of(one) == "ok", what="another key")
    site.at_hub("keys", "revoke", rotated["id"])
    everywhere(after, lambda one: code_of(one) == "invalid_api_key", what="the revocation")
    everywhere(kept, lambda one: code_of(one) == "ok", what="the other key, of which there was news as well")

    site.parts["hub"].stop()
    unseen = site.key()[1]
    for one in [*kept, *site.services]:
        assert code_of(one) == "ok"
    for one in [*after, *services]:
        assert code_of(one) in ("invalid_api_key", "broker_lost"), "what was taken away doesn't come back"
    for one in site.with_key(unseen):
        answer = one.post({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]})
        assert answer.status_code == 503
    site.at_hub("keys", "revoke", rotated["id"])
    site.start_again("hub")
    until(lambda: "The hub is up" in site.parts["hub"].said(), what="the hub")
    everywhere(site.with_key(unseen), lambda one: code_of(one) == "ok", what="a key that was made meanwhile", within_s=END_S)


# credentials that are short-lived
def test_a_stream_outlives_the_credentials_of_both_its_ends(streamed: Streamed) -> None:
    streamed.join(END_S)
    assert not streamed.failed
    for role, expired_s in streamed.expired_s.items():
        assert streamed.parts.expires_at_s(role) > expired_s + LIFE_S
    assert "fallow_attempts_failed_total{" not in streamed.service.get("/metrics").text, "it did not even have to move"
    assert all(refused_cards(streamed.service, reason) == 0 for reason in REASONS)


def test_all_come_back_to_a_hub_that_was_away_for_longer_than_a_credential_lives(streamed: Streamed) -> None:
    parts, service = streamed.parts, streamed.service
    parts.parts["hub"].stop()
    assert code_of(service) != "ok"
    until(lambda: time.time() > max(parts.expires_at_s("node"), parts.expires_at_s("gateway")), what="the end of their credentials")
    parts.start_hub()
    until(lambda: "ready" in readiness(service), what="gateway and node are back")
    with service.client() as client:
        say(client, SHORT)
    for name in ("gateway", "node"):
        assert parts.parts[name].process.poll() is None


def test_a_hub_that_knows_its_country_refuses_a_region_and_gateways_judge_for_themselves(streamed: Streamed) -> None:
    """The hub stands in Germany, and a node on the same machine says that it is in America. This gateway doesn't know where it is."""
    parts, service = streamed.parts, streamed.service
    command: Any = parts.parts["node"].process.args
    parts.lend("liar", "--engine", str(command[command.index("--engine") + 1]), "--slots", "4", region="na-us")
    liar = node_id_of(parts.folder / "liar")
    hub = parts.parts["hub"]
    until(lambda: f"the card of {liar} is refused: the node can't be where it says" in hub.said(), within_s=END_S, what="the refusal")
    assert node_id_of(parts.folder / "node") not in "".join(line for line in hub.said().splitlines() if "is refused" in line)
    until(lambda: org_of(service, liar) == "home", within_s=END_S, what="the node at the gateway")
    logged = msgspec.json.decode(told("hub", "log", "--json", "--data", str(parts.folder / "hub")))
    assert liar in [entry["node_id"] for entry in logged], "what it said before it was measured"
    assert parts.parts["liar"].process.poll() is None, "it stays a member"


def readiness(service: Service) -> list[str]:
    """Of what is offered; nothing while nobody can tell whose the key is."""
    answer = service.get("/fallow/nodes")
    return [offer["readiness"] for node in answer.json()["nodes"] for offer in node["offers"]] if answer.status_code == 200 else []
