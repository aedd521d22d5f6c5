"""Settings: one commented TOML in the data folder, flags over it, each app's own frozen value out of it."""

import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
import platformdirs
from msgspec import Meta

from fallow.adapters.files import make_folder, write_private
from fallow.apps import lend_settings
from fallow.core import hours
from fallow.model.call import CONCURRENCY_DEFAULT, PER_MINUTE_MAX, WEIGHT_MAX
from fallow.model.errors import BadFlag, BadSetting
from fallow.model.messages import SuiteName
from fallow.model.needs import COUNTRY_UNKNOWN, Isolation, Prefer, Privacy, Ring
from fallow.wire import complaint

FILE = "settings.toml"
KEY_FILE = "key"
INVITATION_FILE = "invitation"
"""What the hub on this data folder invites its own machine's gateway and node with."""
HUB_FILE = "hub.json"
"""Where a running hub writes its addresses, for the commands on the same machine."""
DATABASE_FILE = "hub.db"
ORGANISATION_KEY_FILE = "org.nk"
"""The private key of this machine's organisation."""
HUB_KEYS_FOLDER = "hub/keys"
"""The keys of a hub from which all credentials follow."""
HUB_TLS_FOLDER = "hub/tls"
"""The certificates that a hub made itself."""
ADDRESS_FILE = "gateway.json"
"""Where a running gateway writes its address, for the commands on the same machine."""
LISTEN_DEFAULT = "127.0.0.1:8422"
LISTEN = re.compile(r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9_.-]+):([0-9]{1,5})\Z")
PORT_MAX = 65_535
Port = Annotated[int, Meta(ge=0, le=65535)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]
Host = Annotated[str, Meta(pattern=r"^[A-Za-z0-9.:_-]{1,253}\Z")]
Country = Annotated[str, Meta(pattern=r"^[a-z]{2}$")]

TEMPLATE = (
    """\
# Fallow's settings on this machine. Every line that is commented out shows the default.
# Flags on the command line win over this file.

[organisation]
# Who owns this machine, its gateway and its keys.
# id = "home"
# The country that its calls come from, as two letters: lenders may refuse some.
# Gateway and hub judge from there which regions of nodes are possible: let it be where this machine stands.
# country = "unknown"

[key]
# What the API key of this hub allows. Its calls may ask for less, never for more.
# Whose machines: own, partner, market (anyone). The owner of a machine can read what runs on it.
# rings = ["own", "partner"]
# Of the organisations that yours agreed with (`fallow org`), those whose machines may be used; empty: all.
# partners = []
# Where calls may run, such as ["eu-de"] and ["de", "at"]; empty: anywhere.
# regions = []
# countries = []
# cpu or gpu; empty: either.
# hardware = ""
# How engines must at least be kept apart from the lender's machine: none, landlock or bwrap.
# isolation = "none"
# cheap or fast: what matters among machines that meet a call's needs.
# prefer = "cheap"
# What the way an answer travels may tell: plain; padded (sizes rounded up, ten pieces a second at most); whole (in one go at its end).
# privacy = "plain"
# The most that a call may cost, and a million output tokens, in credits (1 credit is 1 USD); 0: no limit.
# max_cost = 0
# max_price = 0
# Calls at once in each gateway; then calls and tokens a minute, prompts and answers together, 0: no limit.
# concurrency = 256
# calls_per_minute = 0
# tokens_per_minute = 0
# Where work waits, a key of weight 2 gets twice as much done as one of weight 1.
# weight = 1.0

[hub]
# Where the broker listens. Beyond this machine itself it speaks TLS only, with the certificate below or one of its own making.
# `fallow up` takes any free port of this machine instead, unless this line is set to something else.
# listen = "127.0.0.1:8422"
# A nats-server that runs already; empty: Fallow starts one.
# broker = ""
# The names and addresses by which others reach it, for invitations and its certificate; empty: this machine's name.
# names = []
# A certificate and its key as PEM files; empty: made here, and handed out with invitations.
# certificate = ""
# certificate_key = ""
# A port for WebSocket, for those who can't connect otherwise; 0: none.
# websocket_port = 0
# Whether machines without an invitation may join too, as lenders to an organisation of their own.
# open = false
# Where keys, organisations and members are kept: sqlite:///a/file, or postgresql://user:password@host/name for several hubs.
# Empty: hub.db in the data folder.
# database = ""

[network]
# An HTTP proxy through which the broker is reached, by its WebSocket address, such as http://proxy:3128.
# proxy = ""
# How gateways' sessions with this machine's node are sealed: mlkem768-x25519, or x25519 alone.
# suite = "mlkem768-x25519"

[gateway]
# Where callers' HTTP is answered.
# host = "127.0.0.1"
# port = 8400

[node]
# What this machine lends.
# Models of the catalogue (`fallow models list`); the first is loaded at once, the others when somebody calls for them.
# models = ["smollm2-135m-instruct"]
# Memory for all engines together, in GB; 0: half of what is free when the node starts. The least recently used model leaves first.
# memory_gb = 0
# region = "unknown"
# Threads of the engine; 0: one less than there are cores.
# threads = 0
# Calls answered at the same time; 0: what fits.
# slots = 0
# Seconds without any progress after which the engine is restarted.
# stall_s = 30
# Seconds for which a call waits here while the engine loads, before it is told so.
# load_wait_s = 10

[models]
# Where model files are kept; empty: the user's cache folder.
# folder = ""
# Gigabytes that they may take there; 0: all that the disk has.
# disk_gb = 50

"""
    + lend_settings.TEMPLATE
)


class Organisation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: Name = "home"
    country: Annotated[str, Meta(pattern=r"^([a-z]{2}|unknown)\Z")] = COUNTRY_UNKNOWN


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The policy and the allowance of the hub's key."""

    rings: Annotated[tuple[Ring, ...], Meta(min_length=1, max_length=3)] = ("own", "partner")
    partners: Annotated[tuple[Name, ...], Meta(max_length=256)] = ()
    regions: Annotated[tuple[Name, ...], Meta(max_length=256)] = ()
    countries: Annotated[tuple[Country, ...], Meta(max_length=256)] = ()
    hardware: Literal["", "cpu", "gpu"] = ""
    isolation: Isolation = "none"
    prefer: Prefer = "cheap"
    privacy: Privacy = "plain"
    max_cost: lend_settings.Usd = 0.0
    max_price: lend_settings.Usd = 0.0
    concurrency: Annotated[int, Meta(ge=1, le=100_000)] = CONCURRENCY_DEFAULT
    calls_per_minute: Annotated[int, Meta(ge=0, le=PER_MINUTE_MAX)] = 0
    tokens_per_minute: Annotated[int, Meta(ge=0, le=PER_MINUTE_MAX)] = 0
    weight: Annotated[float, Meta(ge=1 / WEIGHT_MAX, le=WEIGHT_MAX)] = 1.0


class Hub(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    listen: str = LISTEN_DEFAULT
    broker: str = ""
    names: Annotated[tuple[Host, ...], Meta(max_length=16)] = ()
    certificate: str = ""
    certificate_key: str = ""
    websocket_port: Port = 0
    open: bool = False
    database: str = ""


class Network(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    proxy: str = ""
    suite: SuiteName = "mlkem768-x25519"


class Gateway(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    port: Port = 8400


class Node(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    models: Annotated[tuple[str, ...], Meta(min_length=1, max_length=64)] = ("smollm2-135m-instruct",)
    memory_gb: Annotated[float, Meta(ge=0, le=100_000)] = 0.0
    region: Name = "unknown"
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    slots: Annotated[int, Meta(ge=0, le=256)] = 0
    stall_s: Annotated[float, Meta(ge=1, le=3600)] = 30.0
    load_wait_s: Annotated[float, Meta(ge=0, le=600)] = 10.0


class Models(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    folder: str = ""
    disk_gb: Annotated[int, Meta(ge=0, le=1_000_000)] = 50

    @property
    def disk_bytes(self) -> int:
        return self.disk_gb * 10**9


class Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of the file."""

    organisation: Organisation = Organisation()
    key: Key = Key()
    hub: Hub = Hub()
    network: Network = Network()
    gateway: Gateway = Gateway()
    node: Node = Node()
    models: Models = Models()
    lend: lend_settings.Lend = lend_settings.Lend()
    power: lend_settings.Power = lend_settings.Power()
    engine: lend_settings.Attached = lend_settings.Attached()


class Settings(Document, frozen=True, kw_only=True):
    """All of the file, and the folder in which it lies."""

    data: Path = Path()

    @property
    def database(self) -> str:
        """The address of the hub's database; it may hold a password."""
        return self.hub.database or f"sqlite:///{self.data / DATABASE_FILE}"

    @property
    def models_folder(self) -> Path:
        return Path(self.models.folder).expanduser() if self.models.folder else Path(platformdirs.user_cache_dir("fallow")) / "models"


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """What the environment tells a command that calls a gateway."""

    base_url: str = ""
    api_key: str = ""


def default_data() -> Path:
    """FALLOW_DATA, or the user's data folder."""
    chosen = os.environ.get("FALLOW_DATA")
    return Path(chosen) if chosen else Path(platformdirs.user_data_dir("fallow"))


def caller() -> Caller:
    """FALLOW_BASE_URL and FALLOW_API_KEY."""
    return Caller(base_url=os.environ.get("FALLOW_BASE_URL", ""), api_key=os.environ.get("FALLOW_API_KEY", ""))


class Desktop(msgspec.Struct, frozen=True, kw_only=True):
    """How the owner's desktop is reached."""

    session_bus: str
    system_bus: str
    has_display: bool


def desktop() -> Desktop:
    """DBUS_SESSION_BUS_ADDRESS, DBUS_SYSTEM_BUS_ADDRESS, and whether there is a display."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    session = os.environ.get("DBUS_SESSION_BUS_ADDRESS", "")
    if not session and runtime and Path(runtime, "bus").exists():
        session = f"unix:path={runtime}/bus"
    return Desktop(
        session_bus=session,
        system_bus=os.environ.get("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/run/dbus/system_bus_socket"),
        has_display=bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")),
    )


def inherited() -> dict[str, str]:
    """The environment for our own child processes."""
    return dict(os.environ)


def invitation_from_environment() -> str:
    """FALLOW_JOIN: an invitation, for machines that join without a flag."""
    return os.environ.get("FALLOW_JOIN", "")


def load(data: Path | None, flags: dict[str, Any] | None = None) -> Settings:
    """The settings of a data folder, which is made if need be, with `flags` ("node.slots": 4) over them; None means not given.

    Raises BadSetting naming file, line and what was expected, or BadFlag.
    """
    folder = make_folder((data or default_data()).expanduser())
    path = folder / FILE
    if not path.exists():
        write_private(path, TEMPLATE)
    try:
        text = path.read_text()
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadSetting(f"{path}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadSetting(f"{path} can't be read: {error}") from None
    _convert(document, lambda name: f"{path}, line {line_of(text, name)}", BadSetting)
    for name, value in (flags or {}).items():
        if value is not None:
            section, _, key = name.partition(".")
            document.setdefault(section, {})[key] = value
    settings = _convert(document, lambda name: f"--{name.rpartition('.')[2].replace('_', '-')}", BadFlag)
    return Settings(**msgspec.structs.asdict(settings), data=folder)


def _convert(document: dict[str, Any], where: Callable[[str], str], fault: type[BadSetting]) -> Document:
    try:
        settings = msgspec.convert(document, Document)
    except msgspec.ValidationError as error:
        found = complaint.read(str(error))
        message = "there is no such setting" if found.kind == "unknown" else found.message + _choices(found.path)
        raise fault(f"{where(found.path)}: {found.path}: {message}") from None
    listen = LISTEN.match(settings.hub.listen)
    if listen is None or int(listen.group(2)) > PORT_MAX:
        raise fault(f"{where('hub.listen')}: hub.listen: expected HOST:PORT, such as {LISTEN_DEFAULT}, got {settings.hub.listen!r}")
    if "@" in settings.hub.broker:
        raise fault(f"{where('hub.broker')}: hub.broker: an address holds no secrets; who we are comes from --join")
    for name, text in (("lend.hours", settings.lend.hours), *(("power.windows", one.hours) for one in settings.power.windows)):
        try:
            if not hours.parse(text) and name == "power.windows":
                raise ValueError(f"{hours.EXPECTED}, got an empty text")
        except ValueError as error:
            raise fault(f"{where(name)}: {name}: {error}") from None
    return settings


def _choices(name: str) -> str:
    """The words that a setting may be, where it is one of a few."""
    section, _, key = name.partition(".")
    kind = next((f.type for f in msgspec.structs.fields(Document) if f.name == section), None)
    field = next((f.type for f in msgspec.structs.fields(kind) if f.name == key), None) if kind is not None else None
    words = [word for one in (field, *get_args(field)) if get_origin(one) is Literal for word in get_args(one)]
    return f"; it may be {', '.join(word or 'empty' for word in words)}" if len(words) > 1 else ""


def line_of(text: str, name: str) -> int:
    """The line on which a setting (`gateway.port`) stands; that of its section if it can't be told; 1 at least."""
    section, _, key = name.partition(".")
    of_key, of_section = _word(key or section), _word(section)
    current, found = "", 1
    for number, line in enumerate(text.splitlines(), 1):
        heading = _HEADING.match(line)
        here = current == (section if key else "") and re.match(rf"\s*{of_key}\s*=", line)
        inline = key and not current and re.match(rf"\s*{of_section}\s*(\.\s*{of_key}\s*=|=.*\b{re.escape(key)}\b)", line)
        if heading:
            current = heading.group(1)
            found = number if current == section else found
        elif here or inline:
            return number
    return found


_HEADING = re.compile(r"""\s*\[\s*["']?([^"'\]]*?)["']?\s*\]""")


def _word(name: str) -> str:
    """A pattern for a name in TOML, bare or in quotes."""
    return rf"""["']?{re.escape(name)}["']?"""
