"""The commands that run processes: settings in, an app's main out."""

import asyncio
import contextlib
import functools
import shutil
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from fallow.adapters.endpoint import parse_endpoint
from fallow.apps.run import Stop, complain, run
from fallow.apps.settings import INVITATION_FILE, Settings, invitation_from_environment, load
from fallow.cli.bar import Bar
from fallow.model.errors import BadFlag, FallowError, StartFailed
from fallow.model.weights import Weights

if TYPE_CHECKING:
    from fallow.wire.invitation import Invitation


def _read(data: Path | None, flags: dict[str, Any], hub: str = "") -> Settings:
    """The settings; complains and exits if they can't be read: 2 for a wrong flag, 1 for a wrong file."""
    try:
        if "@" in hub:
            raise BadFlag("--hub: an address holds no secrets; who we are comes from --join")
        return load(data, flags)
    except FallowError as error:
        complain(error)
        sys.exit(2 if isinstance(error, BadFlag) else 1)


class Invited(msgspec.Struct, frozen=True, kw_only=True):
    """What a flag says of an invitation: the token itself, or a file with it."""

    token: str = ""
    file: Path | None = None

    def read(self, settings: Settings) -> "Invitation | None":
        """The invitation of the flags, of FALLOW_JOIN, or of the hub on this data folder; None if there is none. Raises StartFailed."""
        from fallow.apps.joining import read_invitation

        if self.token:
            return read_invitation(self.token, "--join")
        if self.file is not None:
            return read_invitation(_text_of(self.file), str(self.file))
        if (given := invitation_from_environment()) != "":
            return read_invitation(given, "FALLOW_JOIN")
        here = settings.data / INVITATION_FILE
        return read_invitation(_text_of(here), str(here)) if here.exists() else None


def _text_of(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise StartFailed(f"could not read {file}: {getattr(error, 'strerror', None) or 'it is no text'}") from None


LEND_FLAGS = {
    "model": "node.models",
    "slots": "node.slots",
    "threads": "node.threads",
    "profile": "lend.profile",
    "cores": "lend.cores",
    "hours": "lend.hours",
    "isolation": "lend.isolation",
}
"""Each flag of `fallow lend` that is a setting, and which."""


class Lending(msgspec.Struct, frozen=True, kw_only=True):
    """What `fallow lend` was told besides settings. `with_up`: it is a part of `fallow up`."""

    hub: str
    engine: str
    invited: Invited
    with_up: bool


def up(data: Path | None, flags: dict[str, Any], *, ephemeral: bool, verbose: bool) -> int:
    """`fallow up`."""
    from fallow.apps.up import run_up

    if ephemeral and data is not None:
        complain(BadFlag("--ephemeral makes a data folder of its own; leave out --data"))
        return 2
    temporary = Path(tempfile.mkdtemp(prefix="fallow-")) if ephemeral else None
    try:
        settings = _read(temporary or data, flags)
        chosen = {name: flags[f"lend.{name}"] for name in ("profile", "isolation")}
        lend_flags = [word for name, value in chosen.items() if value is not None for word in (f"--{name}", value)]
        lend_flags += [word for name in flags["node.models"] or () for word in ("--model", name)]

        async def main(stop: Stop) -> None:
            await _have_weights(settings, stop.asked)
            if not stop.asked.is_set():
                await run_up(settings, lend_flags, stop, functools.partial(_greet, settings))

        return run(main, verbose=verbose)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


async def _have_weights(settings: Settings, until: asyncio.Event) -> None:
    """Fetch the models that this machine lends, but not past a request to stop; raises what `fetch` does."""
    from fallow.adapters.catalogue import load_catalogue

    catalogue = load_catalogue(settings.data)
    for weights in [catalogue.find(name) for name in settings.node.models]:
        if not until.is_set():
            await _have(weights, settings, until)


async def _have(weights: Weights, settings: Settings, until: asyncio.Event) -> None:
    from fallow.adapters.fetch import Options, fetch

    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def work() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            try:
                fetch(weights, settings.models_folder, progress=bar, options=Options(budget_bytes=settings.models.disk_bytes))
            except Exception as error:  # noqa: BLE001  (it is raised again where somebody waits for it)
                loop.call_soon_threadsafe(done.set_exception, error)
            else:
                loop.call_soon_threadsafe(done.set_result, None)

    size = f"{weights.size_bytes // 10**6} MB, " if weights.size_bytes else ""
    with Bar(f"{weights.name} ({size}{weights.licence})") as bar:
        threading.Thread(target=work, daemon=True).start()  # a daemon, so that stopping needn't wait for a slow network
        stop = asyncio.ensure_future(until.wait())
        either: list[asyncio.Future[Any]] = [done, stop]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
    if done.done():
        done.result()
    else:
        sys.stderr.write("fallow: stopped while fetching; what came is kept\n")


def _greet(settings: Settings, base_url: str, key: str, node_id: str) -> None:
    model = settings.node.models[0]
    print(
        f"Fallow is up: {', '.join(settings.node.models)} on {node_id}\n"
        f"  base URL  {base_url}\n"
        f"  API key   {key}\n\n"
        "Try it:\n"
        f"  curl {base_url}/chat/completions \\\n"
        f"    -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}\'\n'
        f"  fallow chat{_data_flag(settings)} 'Hello!'\n\n"
        "Ctrl-C stops everything.",
        flush=True,
    )


def _data_flag(settings: Settings) -> str:
    from fallow.apps.settings import default_data

    return "" if settings.data == default_data().resolve() else f" --data {settings.data}"


def hub(data: Path | None, *, listen: str | None, broker: str | None, life_s: int | None, verbose: bool, ready_fd: int | None) -> int:
    """`fallow hub`. `life_s` is of the credentials that it gives, where tests want another than a day's."""
    from fallow.apps.hub.enrolling import LIFE_S
    from fallow.apps.hub.main import run_hub

    settings = _read(data, {"hub.listen": listen, "hub.broker": broker})

    async def main(stop: Stop) -> None:
        await run_hub(settings, stop.asked, ready_fd, life_s=life_s or LIFE_S)

    return run(main, verbose=verbose)


def gateway(
    data: Path | None, hub: str, *, port: int | None, host: str | None, invited: Invited, verbose: bool, ready_fd: int | None
) -> int:
    """`fallow gateway`."""
    from fallow.apps.gateway.main import run_gateway

    settings = _read(data, {"gateway.port": port, "gateway.host": host}, hub)

    async def main(stop: Stop) -> None:
        await run_gateway(settings, hub, invited.read(settings), stop, ready_fd)

    return run(main, verbose=verbose)


def lend(data: Path | None, flags: dict[str, Any], lending: Lending, *, verbose: bool, ready_fd: int | None) -> int:
    """`fallow lend`."""
    from fallow.apps.node.main import Joining, run_node

    settings = _read(data, flags, lending.hub)
    if lending.engine:
        try:
            parse_endpoint(lending.engine)
        except BadFlag as error:
            complain(error)
            return 2

    async def main(stop: Stop) -> None:
        invited = lending.invited.read(settings)
        if not lending.engine:
            await _have_weights(settings, stop.asked)
        if not stop.asked.is_set():
            joining = Joining(
                hub=lending.hub,
                invited=invited,
                engine=lending.engine,
                only=tuple(flags["node.models"] or ()),
                with_up=lending.with_up,
                reload=functools.partial(load, settings.data, flags),
                ready=ready_fd,
            )
            await run_node(settings, joining, stop)

    return run(main, verbose=verbose)


def install(given: Mapping[str, Any], *, print_only: bool) -> int:
    """`fallow lend … install`: a service with the same flags. They are checked first, as `fallow lend` would."""
    from fallow.cli import install

    data, hub = given["data"], given["hub"]
    flags = {name: given[flag] or None for flag, name in LEND_FLAGS.items()}
    if not print_only:
        _read(data, flags, hub)
    words: list[str] = []
    for flag in ("engine", *LEND_FLAGS):
        values = given[flag] if isinstance(given[flag], (list, tuple)) else [given[flag]]
        words += [word for value in values if value not in (None, "") for word in (f"--{flag}", str(value))]
    return install.install(data, hub, words, join_file=given["join_file"], print_only=print_only)
