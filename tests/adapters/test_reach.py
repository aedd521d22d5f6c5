"""How a broker is reached: TLS with an authority of our own, WebSocket, an HTTP proxy; and that it isn't where it shouldn't be."""

import asyncio
import datetime
import ssl
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography import x509
from http_proxy import Proxy
from trusted import HERE, Site, until

from fallow.adapters.broker import start_broker
from fallow.adapters.certificates import RENEW_DAYS, SERVER_DAYS, TlsFiles, ca_pem, kept_certificate
from fallow.adapters.nats_bus import NatsBus, Reach
from fallow.adapters.nkey import Credentials, make_key
from fallow.adapters.operator import Operator
from fallow.model.errors import BadSetting, StartFailed
from fallow.ports import Delivery

pytestmark = pytest.mark.anyio

NOW = datetime.datetime(2026, 5, 1, tzinfo=datetime.UTC)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("authority")


@pytest.fixture(scope="module")
async def closed(anyio_backend: str, authority: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """A broker with TLS, on both listeners."""
    files = kept_certificate(authority, [HERE, "localhost"])
    site = await Site.start(tmp_path_factory.mktemp("closed"), tls=files, websocket_port=0)
    yield site
    await site.broker.stop()


@pytest.fixture(scope="module")
async def open_site(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """A broker without TLS, on both listeners."""
    site = await Site.start(tmp_path_factory.mktemp("open"), websocket_port=0)
    yield site
    await site.broker.stop()


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    played = Proxy()
    await played.start()
    yield played
    await played.stop()


async def talk(site: Site, address: str, reach: Reach | None) -> None:
    """A member and the hub hear each other, and a renewal works, there."""
    login = site.member("node")
    node = NatsBus(address, login, "node", reach=reach)
    hub = NatsBus(address, site.operator.hub_user(), "hub", reach=reach)
    heard: list[Delivery] = []
    for bus in (node, hub):
        await bus.connect(within_s=5)
    await hub.subscribe("hb.*", heard.append)
    await node.publish(f"hb.{login.key.public}", b"1")
    await node.renew(site.member("node", login.key))
    await node.publish(f"hb.{login.key.public}", bytes(200_000))
    await until(lambda: len(heard) == 2)
    assert [len(one.data) for one in heard] == [1, 200_000]
    await node.close()
    await hub.close()


# TLS
@pytest.mark.parametrize("host", [HERE, "localhost"])
async def test_tls_with_our_own_authority(closed: Site, authority: Path, host: str) -> None:
    assert closed.broker.address.startswith("tls://")
    await talk(closed, closed.broker.address.replace(HERE, host), Reach(ca_pem=ca_pem(authority)))


async def test_tls_is_1_3(closed: Site, authority: Path) -> None:
    context = ssl.create_default_context(cadata=ca_pem(authority))
    port = int(closed.broker.address.rpartition(":")[2])
    _, writer = await asyncio.open_connection(HERE, port, ssl=context)
    assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
    writer.close()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, OSError)):
        await asyncio.open_connection(HERE, port, ssl=context)


@pytest.mark.parametrize("kind", ["tls", "wss"])
@pytest.mark.parametrize("trusts", ["another", "the system's"])
async def test_a_certificate_that_we_do_not_believe_is_refused(closed: Site, tmp_path: Path, kind: str, trusts: str) -> None:
    kept_certificate(tmp_path, [HERE])
    address = closed.broker.address if kind == "tls" else closed.broker.websocket_address
    reach = Reach(ca_pem=ca_pem(tmp_path) if trusts == "another" else "")
    bus = NatsBus(address, closed.member("node"), "node", reach=reach)
    with pytest.raises(StartFailed, match="certificate"):
        await bus.connect(within_s=5)
    assert not bus.is_up()
    await bus.close()


async def test_a_wrong_name_in_the_certificate_is_refused(authority: Path, tmp_path: Path) -> None:
    files = kept_certificate(tmp_path / "c", ["somewhere.example"])
    site = await Site.start(tmp_path, tls=files)
    bus = NatsBus(site.broker.address, site.member("node"), "node", reach=Reach(ca_pem=ca_pem(tmp_path / "c")))
    try:
        with pytest.raises(StartFailed, match="certificate"):
            await bus.connect(within_s=5)
    finally:
        await bus.close()
        await site.broker.stop()


async def test_nonsense_for_an_authority_is_told(closed: Site) -> None:
    bus = NatsBus(closed.broker.address, closed.member("node"), "node", reach=Reach(ca_pem="nonsense"))
    with pytest.raises(BadSetting, match="PEM"):
        await bus.connect()
    await bus.close()


# WebSocket
async def test_websocket(open_site: Site) -> None:
    assert open_site.broker.websocket_address.startswith("ws://")
    await talk(open_site, open_site.broker.websocket_address, None)


async def test_websocket_with_tls(closed: Site, authority: Path) -> None:
    assert closed.broker.websocket_address.startswith("wss://")
    await talk(closed, closed.broker.websocket_address, Reach(ca_pem=ca_pem(authority)))


async def test_a_websocket_comes_back(authority: Path, tmp_path: Path) -> None:
    files = kept_certificate(authority, [HERE, "localhost"])
    site = await Site.start(tmp_path, tls=files, websocket_port=0)
    bus = NatsBus(site.broker.websocket_address, site.operator.hub_user(), "hub", reach=Reach(ca_pem=ca_pem(authority)))
    await bus.connect(within_s=5)
    heard: list[Delivery] = []
    await bus.subscribe("hb.*", heard.append)
    port, websocket_port = (int(one.rpartition(":")[2]) for one in (site.broker.address, site.broker.websocket_address))
    await site.broker.stop()
    await until(lambda: not bus.is_up())
    trust = site.operator.trust({})
    broker = await start_broker(tmp_path / "broker", host=HERE, port=port, websocket_port=websocket_port, trust=trust, tls=files)
    await until(bus.is_up, what="the connection is back")
    login = site.member("node")
    node = NatsBus(broker.address, login, "node", reach=Reach(ca_pem=ca_pem(authority)))
    await node.connect()
    await node.publish(f"hb.{login.key.public}", b"x")
    await until(lambda: heard)
    await node.close()
    await bus.close()
    await broker.stop()


# through a proxy
async def test_through_a_proxy(closed: Site, authority: Path, proxy: Proxy) -> None:
    reach = Reach(ca_pem=ca_pem(authority), proxy=proxy.address)
    await talk(closed, closed.broker.websocket_address, reach)
    target = closed.broker.websocket_address.removeprefix("wss://")
    assert proxy.asked == [f"CONNECT {target} HTTP/1.1"] * 3


async def test_a_proxy_that_refuses_is_told(closed: Site, authority: Path, proxy: Proxy) -> None:
    proxy.refuses = True
    bus = NatsBus(closed.broker.websocket_address, closed.member("node"), "n", reach=Reach(ca_pem=ca_pem(authority), proxy=proxy.address))
    with pytest.raises(StartFailed, match="proxy refused: 403"):
        await bus.connect(within_s=0.5)
    await bus.close()


async def test_a_proxy_that_is_not_there_is_told(closed: Site, authority: Path) -> None:
    reach = Reach(ca_pem=ca_pem(authority), proxy="http://user:word@127.0.0.1:9")
    bus = NatsBus(closed.broker.websocket_address, closed.member("node"), "n", reach=reach)
    with pytest.raises(StartFailed, match="proxy can't be reached") as caught:
        await bus.connect(within_s=0.5)
    assert "word" not in caught.value.message
    assert "word" not in repr(reach)
    await bus.close()


@pytest.mark.parametrize("address", ["nats://h:1", "tls://h:1", "ws://h:1"])
def test_only_a_closed_websocket_goes_through_a_proxy(address: str) -> None:
    with pytest.raises(BadSetting, match="wss://"):
        NatsBus(address, Credentials("", make_key("user")), "n", reach=Reach(proxy="http://p:1"))


# where it listens
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "somewhere.example"])
async def test_without_tls_it_listens_here_only(tmp_path: Path, host: str) -> None:
    trust = Operator.open(tmp_path / "o").trust({})
    with pytest.raises(StartFailed, match="certificate") as caught:
        await start_broker(tmp_path / "b", host=host, port=0, trust=trust)
    assert host in caught.value.message
    assert "\n" not in caught.value.message
    assert not (tmp_path / "b").exists()


async def test_without_tls_it_listens_elsewhere_if_that_is_wanted(tmp_path: Path) -> None:
    """Behind something else that does TLS."""
    trust = Operator.open(tmp_path / "o").trust({})
    broker = await start_broker(tmp_path / "b", host="0.0.0.0", port=0, websocket_port=0, trust=trust, plain_ok=True)
    assert broker.address.startswith(f"nats://{HERE}:")
    assert broker.websocket_address.startswith(f"ws://{HERE}:")
    await broker.stop()


async def test_a_certificate_that_is_none_is_told(tmp_path: Path) -> None:
    for name in ("c", "k"):
        (tmp_path / name).write_text("nonsense")
    files = TlsFiles(certificate=tmp_path / "c", key=tmp_path / "k")
    with pytest.raises(StartFailed) as caught:
        await start_broker(tmp_path / "b", host=HERE, port=0, trust=Operator.open(tmp_path / "o").trust({}), tls=files)
    assert "\n" not in caught.value.message


# certificates
def test_certificates_are_kept_and_their_keys_private(tmp_path: Path) -> None:
    first = kept_certificate(tmp_path, [HERE, "hub.example"], now=NOW)
    seen = first.certificate.read_bytes()
    assert kept_certificate(tmp_path, ["hub.example", HERE, HERE], now=NOW) == first
    assert first.certificate.read_bytes() == seen
    for path in (first.key, tmp_path / "authority.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    made = x509.load_pem_x509_certificate(seen)
    assert (made.not_valid_after_utc - made.not_valid_before_utc).days == SERVER_DAYS
    assert made.not_valid_before_utc < NOW < made.not_valid_after_utc


@pytest.mark.parametrize(
    ("days", "is_new"), [(0, False), (SERVER_DAYS - RENEW_DAYS - 2, False), (SERVER_DAYS - RENEW_DAYS, True), (900, True)]
)
def test_certificates_are_renewed_in_time(tmp_path: Path, days: int, is_new: bool) -> None:
    seen = kept_certificate(tmp_path, [HERE], now=NOW).certificate.read_bytes()
    authority = ca_pem(tmp_path)
    again = kept_certificate(tmp_path, [HERE], now=NOW + datetime.timedelta(days=days))
    assert (again.certificate.read_bytes() != seen) is is_new
    assert ca_pem(tmp_path) == authority, "those who trust it need no new word"


def test_other_hosts_need_another_certificate(tmp_path: Path) -> None:
    first = kept_certificate(tmp_path, [HERE], now=NOW).certificate.read_bytes()
    second = kept_certificate(tmp_path, [HERE, "2001:db8::1"], now=NOW).certificate.read_bytes()
    assert first != second
    names = x509.load_pem_x509_certificate(second).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {str(one) for one in names.get_values_for_type(x509.IPAddress)} == {HERE, "2001:db8::1"}


def test_an_authority_that_runs_out_is_made_anew(tmp_path: Path) -> None:
    kept_certificate(tmp_path, [HERE], now=NOW)
    before = ca_pem(tmp_path)
    later = NOW + datetime.timedelta(days=3_640)
    files = kept_certificate(tmp_path, [HERE], now=later)
    assert ca_pem(tmp_path) != before
    made, authority = (x509.load_pem_x509_certificate(one) for one in (files.certificate.read_bytes(), ca_pem(tmp_path).encode()))
    made.verify_directly_issued_by(authority)
    assert authority.not_valid_after_utc > later + datetime.timedelta(days=365)


@pytest.mark.parametrize("hosts", [[], [""], ["a b"], ["ü.example"], ["https://x"], ["h"] * 65])
def test_hosts_that_no_certificate_can_name_are_refused(tmp_path: Path, hosts: list[str]) -> None:
    with pytest.raises(BadSetting):
        kept_certificate(tmp_path, hosts)


def test_what_is_no_certificate_is_named(tmp_path: Path) -> None:
    kept_certificate(tmp_path, [HERE])
    (tmp_path / "authority.pem").write_text("nonsense")
    with pytest.raises(StartFailed, match=r"authority\.pem"):
        kept_certificate(tmp_path, [HERE])
    with pytest.raises(StartFailed, match=r"authority\.pem"):
        ca_pem(tmp_path / "nowhere")
