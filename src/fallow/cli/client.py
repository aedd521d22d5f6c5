"""The commands that call a running gateway."""

import sys
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import requests

from fallow.adapters.files import is_held
from fallow.apps.run import complain
from fallow.apps.settings import ADDRESS_FILE, KEY_FILE, caller, default_data
from fallow.cli.options import short
from fallow.model.errors import BadSetting, FallowError, StartFailed
from fallow.model.owner import WORKING
from fallow.model.views import GatewayStatus, NodeList, NodeView
from fallow.wire import sse
from fallow.wire.openai import CHAT

CONNECT_S = 3
ANSWER_S = 600
PAGE_S = 10
REGION_UNKNOWN = "unknown"
LOOPBACK = ("http://127.", "http://localhost:", "http://[::1]:")
TEXT_BYTES_MAX = 1024 * 1024


T = TypeVar("T")


class Gateway(msgspec.Struct, frozen=True, kw_only=True):
    """Where to call, with which key."""

    base_url: str
    api_key: str

    @property
    def root(self) -> str:
        return self.base_url.rstrip("/").removesuffix("/v1")


class OfferedModel(msgspec.Struct, frozen=True):
    id: str
    endpoints: tuple[str, ...] = (CHAT,)


class Offered(msgspec.Struct, frozen=True):
    """What of a list of models matters here."""

    data: list[OfferedModel]


class StatusDocument(msgspec.Struct, frozen=True, kw_only=True):
    """`fallow status --json`."""

    base_url: str
    api_key: str
    gateway: GatewayStatus
    nodes: list[NodeView]


def find_gateway(data: Path | None, base_url: str) -> Gateway:
    """The gateway that is meant: a flag, the environment, or the one that runs on the data folder; raises StartFailed."""
    told = caller()
    folder = (data or default_data()).expanduser()
    url = base_url or (told.base_url if data is None else "")
    key = told.api_key
    if not url:  # only the gateway of this data folder gets this data folder's key
        address = folder / ADDRESS_FILE
        if not is_held(folder, "gateway") or not address.exists():
            raise StartFailed("no gateway runs here; start one with `fallow up`, or name one with --base-url")
        url = msgspec.json.decode(address.read_bytes(), type=dict[str, str])["base_url"]
        key_file = folder / KEY_FILE
        key = key or (key_file.read_text().strip() if key_file.exists() else "")
    if not url.startswith(("http://", "https://")):
        raise BadSetting(f"{url!r} should look like http://127.0.0.1:8400/v1")
    return Gateway(base_url=url, api_key=key)


def ask(gateway: Gateway, path: str, body: dict[str, Any] | None = None, *, within_s: float = PAGE_S) -> requests.Response:
    """What the gateway says at a path; raises StartFailed with its words, or if it can't be reached."""
    headers = {"authorization": f"Bearer {gateway.api_key}"}
    method = "GET" if body is None else "POST"
    try:
        session = requests.Session()
        session.trust_env = not gateway.root.startswith(LOOPBACK)  # no proxy of the environment for this machine itself
        answer = session.request(
            method, gateway.root + path, json=body, headers=headers, timeout=(CONNECT_S, within_s), stream=body is not None
        )
    except requests.RequestException as error:
        raise StartFailed(f"could not reach the gateway at {gateway.root}: {type(error).__name__}") from None
    if answer.status_code >= 400:
        raise StartFailed(_said(answer.content))
    return answer


def read_as(answer: requests.Response, kind: type[T]) -> T:
    """An answer as what it should be; raises StartFailed."""
    try:
        return msgspec.json.decode(answer.content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, requests.RequestException):
        raise StartFailed("the gateway answered something that can't be read; is it one?") from None


def _said(body: bytes) -> str:
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return "the gateway answered something that can't be read"


def chat(data: Path | None, base_url: str, text: str, *, model: str, max_tokens: int | None) -> int:
    """`fallow chat`."""
    try:
        gateway = find_gateway(data, base_url)
        said = sys.stdin.read(TEXT_BYTES_MAX + 1) if text == "-" else text
        if not said.strip() or len(said) > TEXT_BYTES_MAX:
            raise BadSetting("say something, as an argument or on standard input" if not said.strip() else "that is too long: 1 MB at most")
        if not model:
            offered = [one.id for one in read_as(ask(gateway, "/v1/models"), Offered).data if CHAT in one.endpoints]
            if not offered:
                raise StartFailed("no model that chats is offered now; lend one with `fallow lend`")
            model = offered[0]
        body: dict[str, Any] = {"model": model, "stream": True, "messages": [{"role": "user", "content": said}]}
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        _print_stream(ask(gateway, CHAT, body, within_s=ANSWER_S))
    except FallowError as error:
        complain(error)
        return 2 if isinstance(error, BadSetting) else 1
    return 0


def _print_stream(answer: requests.Response) -> None:
    cutter = sse.EventCutter()
    try:
        for chunk in answer.iter_content(None):
            for event in cutter.feed(chunk):
                if event == sse.DONE:
                    print()
                    return
                if not sse.payload(event):
                    continue
                fields = msgspec.json.decode(sse.payload(event))
                if "error" in fields:
                    print()
                    raise StartFailed(fields["error"]["message"])
                for choice in fields["choices"]:
                    print(choice["delta"].get("content") or "", end="", flush=True)
    except (requests.RequestException, msgspec.DecodeError, KeyError, TypeError):
        pass
    print()
    raise StartFailed("the answer was cut off")


def nodes(data: Path | None, base_url: str, *, as_json: bool) -> int:
    """`fallow nodes`."""
    try:
        found = _nodes(find_gateway(data, base_url))
    except FallowError as error:
        complain(error)
        return 1
    if as_json:
        print(msgspec.json.encode(found).decode())
    else:
        _table(found)
    return 0


def _nodes(gateway: Gateway) -> list[NodeView]:
    return read_as(ask(gateway, "/fallow/nodes"), NodeList).nodes


def _table(found: list[NodeView]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    has_regions = any(node.region != REGION_UNKNOWN for node in found)
    for heading in ("node", "model", "engine", "free", "hardware", *(["region"] if has_regions else []), "heard"):
        table.add_column(heading, no_wrap=heading in ("node", "model", "heard"), overflow="fold")
    for node in found:
        for offer in node.offers:
            waiting = f", {offer.waiting} wait" if offer.waiting else ""
            free = f"{offer.slots_free}/{offer.slots}{waiting}"
            region = [node.region] if has_regions else []
            heard = f"{node.heard_ms_ago / 1000:.1f} s"
            engine = offer.readiness if node.state in WORKING else "paused"
            table.add_row(short(node.node_id), offer.model, engine, free, node.hardware, *region, heard)
    Console().print(table if found else "no nodes; lend this machine with `fallow lend`")


def status(data: Path | None, base_url: str, *, as_json: bool) -> int:
    """`fallow status`."""
    try:
        gateway = find_gateway(data, base_url)
        about = read_as(ask(gateway, "/fallow/status"), GatewayStatus)
        found = _nodes(gateway)
    except FallowError as error:
        complain(error)
        return 1
    if as_json:
        document = StatusDocument(base_url=gateway.base_url, api_key=gateway.api_key, gateway=about, nodes=found)
        print(msgspec.json.encode(document).decode())
        return 0
    broker = "up" if about.broker_up else "away"
    print(f"base URL  {gateway.base_url}\nAPI key   {gateway.api_key}")
    print(f"gateway   {about.gateway_id}, version {about.version}, {about.calls_under_way} calls under way, broker {broker}\n")
    _table(found)
    return 0
