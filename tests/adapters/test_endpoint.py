"""Addresses of servers that lenders bring, and the files that hold their keys."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.adapters.endpoint import KEY_BYTES_MAX, Endpoint, parse_endpoint, read_key
from fallow.model.errors import BadFlag, BadSetting

SECRET = "sk-canary-8812"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://localhost:11434/v1", Endpoint(host="localhost", port=11434)),
        ("http://localhost:11434/v1/", Endpoint(host="localhost", port=11434)),
        ("http://localhost:11434", Endpoint(host="localhost", port=11434)),
        ("http://localhost:11434/", Endpoint(host="localhost", port=11434)),
        ("http://10.0.0.7/v1", Endpoint(host="10.0.0.7", port=80)),
        ("HTTP://Box.Lan/v1", Endpoint(host="box.lan", port=80)),
        ("https://api.example.org/v1", Endpoint(host="api.example.org", port=443, is_tls=True)),
        ("https://example.org/api/v1", Endpoint(host="example.org", port=443, base="/api", is_tls=True)),
        ("https://example.org:8443/a/b-c/v1/", Endpoint(host="example.org", port=8443, base="/a/b-c", is_tls=True)),
        ("http://[::1]:8080/v1", Endpoint(host="::1", port=8080)),
        ("https://[2001:db8::7]/v1", Endpoint(host="2001:db8::7", port=443, is_tls=True)),
        ("unix:/run/engine.sock", Endpoint(socket="/run/engine.sock")),
    ],
)
def test_addresses(address: str, expected: Endpoint) -> None:
    assert parse_endpoint(address) == expected


@pytest.mark.parametrize(
    "address",
    [
        "",
        "localhost:11434",
        "/run/engine.sock",
        "unix:engine.sock",
        "unix:",
        "unix://run/engine.sock",
        "ftp://localhost/v1",
        "http://",
        "http:///v1",
        "http://:80/v1",
        "http://local host/v1",
        "http://localhost:99999/v1",
        "http://localhost:0/v1",
        "http://localhost:x/v1",
        "http://localhost/v2",
        "http://localhost/v1/models",
        "http://localhost//v1",
        "http://localhost/a//v1",
        'http://localhost/a"b/v1',
        "http://localhost/v1?x=1",
        "http://localhost/v1#x",
        "http://localhost/a\r\nb: c/v1",
        "http://localhost/\tv1",
        "http://münchen/v1",
        "http://[::1/v1",
        "http://[fe80::1%eth0]/v1",
        "http://ho$t/v1",
    ],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(BadFlag, match="--engine: expected http://"):
        parse_endpoint(address)


@pytest.mark.parametrize(
    "address",
    [
        f"https://me:{SECRET}@example.org/v1",
        f"https://{SECRET}@example.org/v1",
        f"https://example.org/v1?key={SECRET}",
        f"https://example.org/v1#{SECRET}",
    ],
)
def test_a_secret_in_an_address_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(BadFlag) as caught:
        parse_endpoint(address)
    assert SECRET not in str(caught.value)


@given(st.text(max_size=60) | st.from_regex(r"\Ahttps?://[ -~]{0,40}\Z"))
def test_an_address_is_taken_or_refused(address: str) -> None:
    """Whatever is taken can be put into a request without breaking it."""
    try:
        found = parse_endpoint(address)
    except BadFlag:
        return
    for part in (found.base, found.host_header):
        assert part.isascii()
        assert part.isprintable()
        assert " " not in part
    assert found.socket or found.host
    assert found.socket or 0 < found.port < 65_536


@pytest.mark.parametrize(
    ("address", "header", "client"),
    [
        ("http://localhost:11434/v1", "localhost:11434", "localhost:11434"),
        ("http://box/v1", "box", "box:80"),
        ("http://box:443/v1", "box:443", "box:443"),
        ("https://box/v1", "box", "box:443"),
        ("https://box:80/v1", "box:80", "box:80"),
        ("http://[::1]:8080/v1", "[::1]:8080", "::1:8080"),
        ("unix:/run/e.sock", "localhost", "/run/e.sock"),
    ],
)
def test_host_and_address(address: str, header: str, client: str) -> None:
    assert (parse_endpoint(address).host_header, parse_endpoint(address).address) == (header, client)


@pytest.mark.parametrize(
    ("address", "is_here"),
    [
        ("http://localhost:1/v1", True),
        ("http://LOCALHOST/v1", True),
        ("http://127.0.0.1:1/v1", True),
        ("http://127.9.9.9/v1", True),
        ("http://[::1]/v1", True),
        ("unix:/run/e.sock", True),
        ("http://10.0.0.1/v1", False),
        ("http://127.0.0.1.example.org/v1", False),
        ("https://localhost.example.org/v1", False),
    ],
)
def test_this_machine(address: str, is_here: bool) -> None:
    assert parse_endpoint(address).is_here is is_here


def key_file(folder: Path, data: bytes, mode: int = 0o600) -> Path:
    path = folder / "key"
    path.write_bytes(data)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("data", [SECRET, f"{SECRET}\n", f"  {SECRET}\r\n"])
def test_a_key(tmp_path: Path, data: str) -> None:
    assert read_key(key_file(tmp_path, data.encode())) == SECRET


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o620])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(BadSetting, match="chmod 600") as caught:
        read_key(key_file(tmp_path, SECRET.encode(), mode))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\n \n", id="blank"),
        pytest.param(f"{SECRET}\r\nx-evil: 1".encode(), id="a second header"),
        pytest.param(f"{SECRET} {SECRET}".encode(), id="two words"),
        pytest.param(f"{SECRET}\x00".encode(), id="a zero"),
        pytest.param(f"{SECRET}ä".encode(), id="not ASCII"),
        pytest.param(SECRET.encode() + b"x" * KEY_BYTES_MAX, id="too long"),
    ],
)
def test_what_is_no_key(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(BadSetting, match=r"engine\.key_file") as caught:
        read_key(key_file(tmp_path, data))
    assert SECRET not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="No such file"):
        read_key(tmp_path / "nothing")
    with pytest.raises(BadSetting, match="directory"):
        read_key(tmp_path)
