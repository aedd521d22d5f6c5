"""How every process starts and ends: signals, log, the word that it is ready, and errors as one line."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable

import msgspec

from fallow.adapters.private_memory import keep_private
from fallow.apps.log_limit import LogLimit
from fallow.model.errors import FallowError, leaf

try:
    import uvloop
except ImportError:  # where there is none, asyncio's own loop does
    uvloop = None  # type: ignore[assignment]

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
INTERRUPTED = 130
GATEWAY_DRAIN_S = 30.0
"""How long calls under way may go on at a gateway that was asked to stop; those that take longer end with `gateway_stopping`."""
NODE_DRAIN_S = 15.0
"""The same at a node; those that take longer move to another node.

It is shorter, since the owner may be shutting the machine down, and since what manages services kills after 20 s what doesn't end.
"""


class Stop:
    """What signals asked for: `asked` is set by the first of them, `now` by the second."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.now = asyncio.Event()

    def signal(self) -> None:
        """Somebody wants us to stop."""
        (self.now if self.asked.is_set() else self.asked).set()


Main = Callable[[Stop], Awaitable[None]]


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """What a part tells the process that started it."""

    address: str
    pid: int


def run(main: Main, *, verbose: bool = False) -> int:
    """Run an app until it ends or a signal says stop; returns the exit code. Errors are one line on stderr."""
    keep_private()
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(LogLimit())
    interrupted: list[int] = []

    async def guarded() -> None:
        stop = Stop()
        loop = asyncio.get_running_loop()

        def on_signal(number: int) -> None:
            interrupted.append(number)
            stop.signal()

        for number in STOPPING:
            loop.add_signal_handler(number, on_signal, number)
        await main(stop)

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop if uvloop else None) as runner:
            runner.run(guarded())
    except FallowError as error:
        complain(error)
        return 1
    except Exception as error:
        known = error.split(FallowError)[0] if isinstance(error, ExceptionGroup) else None
        if known is None:
            logging.getLogger("fallow").info("internal error", exc_info=error)
            complain(FallowError(f"internal error ({innermost(error)}); run it with --verbose to see where"))
        else:
            complain(first_of(known))
        return 1
    return INTERRUPTED if signal.SIGINT in interrupted else 0


def first_of(group: ExceptionGroup[FallowError]) -> FallowError:
    """The first error of a group."""
    inner = leaf(group)
    assert isinstance(inner, FallowError)
    return inner


def innermost(error: BaseException) -> str:
    return type(leaf(error)).__name__


def complain(error: FallowError) -> None:
    """An error as one line on stderr."""
    sys.stderr.write(f"fallow: {' '.join(error.message.split())}\n")


def tell_draining(within_s: float) -> None:
    """Tell the user why it takes a while to stop."""
    sys.stderr.write(f"fallow: calls under way end first, within {within_s:g} s; a second signal, or Ctrl-C, stops at once\n")
    sys.stderr.flush()


def tell_ready(descriptor: int | None, address: str, words: str) -> None:
    """Tell the parent that this part works, and where it is reached; without a parent, tell the user in `words`."""
    if descriptor is None:
        print(words, flush=True)
    else:
        os.write(descriptor, msgspec.json.encode(Ready(address=address, pid=os.getpid())) + b"\n")
        os.close(descriptor)
