"""One file over HTTP: asked for again where the line broke, never taken for whole when it isn't."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import requests

from fallow.adapters.address import is_private
from fallow.adapters.memory import AGAIN
from fallow.adapters.store import beside, drop, size_of
from fallow.model.errors import BadChecksum, FetchFailed, NoNetwork

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
RETRY_WAITS_S = (0.2, 0.5, 1.0, 2.0)  # between attempts, so there is one attempt more than waits
NET_CHUNK_BYTES = 1 << 16  # what a lost connection can cost us
SIZE_MAX_BYTES = 1 << 41

_STATUS_WORTH_RETRYING = {408, 425, 429, 500, 502, 503, 504}


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where a file is, and what its server says of it."""

    url: str
    headers: dict[str, str] = {}
    sha256: str | None = None
    size_bytes: int | None = None


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """One file to bring: what it is, where to, and how to find it."""

    what: str
    base: Path
    """What its working files begin with."""
    locate: Callable[[], Address]
    size_bytes: int | None
    is_pinned: bool
    """Whether its checksum is known, so that parts from two versions can't pass for a file."""
    finder: str
    """Who knows where the file is, in words; and who has it."""
    server: str
    advice: str
    tell: Callable[[int, int], None]
    room: Callable[[int], None]
    """Told the bytes still to come before the first of them is written; raises DiskFull."""
    any_host: bool = False
    """Whether plain http beyond this machine will do: the index is the user's choice, and a wheel is pinned."""

    @property
    def part(self) -> Path:
        return beside(self.base, ".part")

    @property
    def etag(self) -> Path:
        return beside(self.base, ".etag")

    @property
    def kept(self) -> str:
        got = size_of(self.part)
        return f"; the {got / 1e6:.1f} MB fetched so far are kept" if got else ""


def complete(session: requests.Session, wanted: Wanted) -> Address | None:
    """Complete the partial file, over as many connections as the limit allows; None: it was whole."""
    if wanted.size_bytes is not None and size_of(wanted.part) == wanted.size_bytes:
        return None
    address: Address | None = None
    lost: requests.RequestException | None = None
    for wait_s in (0.0, *RETRY_WAITS_S):
        time.sleep(wait_s)
        try:
            address = address or wanted.locate()
            _pull(session, address, wanted)
            return address
        except requests.HTTPError as error:
            status = error.response.status_code
            if status not in _STATUS_WORTH_RETRYING:
                who = wanted.server if address else wanted.finder
                raise FetchFailed(f"{who} refused {wanted.what}: HTTP {status}; {wanted.advice} and {AGAIN}") from error
            lost = error
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            lost = error
        except requests.RequestException as error:
            raise unusable(wanted.finder, wanted.what, wanted.advice, error) from error
    assert lost is not None
    who = wanted.server if address else wanted.finder
    raise NoNetwork(f"no network: could not reach {who} for {wanted.what} ({_why(lost)}); connect and {AGAIN}{wanted.kept}") from lost


def unusable(who: str, what: str, advice: str, error: Exception) -> FetchFailed:
    """Without the error's own text: an address in it may hold a password."""
    return FetchFailed(f"{who}'s address or answer for {what} makes no sense ({type(error).__name__}); {advice} and {AGAIN}")


def _why(lost: requests.RequestException) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in str(lost):
        return "its certificate isn't trusted here; if a proxy stands between, point REQUESTS_CA_BUNDLE at the proxy's certificates"
    if isinstance(lost, requests.HTTPError):
        return f"it answers HTTP {lost.response.status_code}"
    if isinstance(lost, requests.exceptions.ProxyError):
        return "the proxy can't be used"
    return "it takes too long to answer" if isinstance(lost, requests.Timeout) else "connection failed or lost"


def _pull(session: requests.Session, address: Address, wanted: Wanted, *, resume: bool = True) -> None:
    """One request for the file, or for the rest of it if a part is there; a server that can't go on sends it anew."""
    total = wanted.size_bytes or address.size_bytes
    etag = wanted.etag.read_text("latin-1").strip() if wanted.etag.exists() else ""
    have = size_of(wanted.part) if resume and (etag or wanted.is_pinned or address.sha256) else 0
    if have and have == total:
        return
    have = have if total is None or have < total else 0
    headers = {**address.headers, "Accept-Encoding": "identity"}  # so that bytes sent are bytes of the file, which a range counts in
    if have:
        headers["Range"] = f"bytes={have}-"
        if etag:
            headers["If-Range"] = etag
    with session.get(address.url, headers=headers, stream=True, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S)) as answer:
        if not wanted.any_host and not all(is_private(one.url) for one in (*answer.history, answer)):
            raise FetchFailed(f"{wanted.server} sends {wanted.what} over plain http, where anybody between could change it; use https")
        stated = answer.headers.get("Content-Range", "")
        if answer.status_code == 416 and etag and stated == f"bytes */{have}":
            return  # an earlier try was cut off after its last byte
        continues = answer.status_code == 206 and stated.startswith(f"bytes {have}-")
        if not have or answer.status_code not in {206, 416} or continues:
            answer.raise_for_status()
            return _save(answer, wanted, total, have=have if continues else 0)
    _pull(session, address, wanted, resume=False)


def _save(answer: requests.Response, wanted: Wanted, total: int | None, *, have: int) -> None:
    """Write what comes behind what we have."""
    announced = _announced(answer)
    if total is not None and announced not in {None, total}:  # seen before the part is touched: it may be a login page
        raise BadChecksum(f"{wanted.what} should have {total} bytes, yet {announced} are offered; {wanted.advice} and {AGAIN}{wanted.kept}")
    total = total or announced
    if total is None and not wanted.is_pinned and answer.headers.get("Transfer-Encoding", "").lower() != "chunked":
        raise FetchFailed(f"{wanted.server} doesn't say how long {wanted.what} is, so a lost end could not be told; use another source")
    limit = total or SIZE_MAX_BYTES
    if total is not None:
        wanted.room(total - have)
    with wanted.part.open("ab" if have else "wb") as file:
        if not have:
            etag = answer.headers.get("ETag", "")
            wanted.etag.write_text("" if etag.startswith("W/") else etag, "latin-1")  # a weak one can't vouch for a range
        for chunk in answer.iter_content(NET_CHUNK_BYTES):
            have += len(chunk)
            if have > limit:
                break
            file.write(chunk)
            wanted.tell(have, total or 0)
    if have > limit:
        drop(wanted.base)
        raise BadChecksum(f"{wanted.what} should have {limit} bytes, yet more came; it was deleted; {wanted.advice} and {AGAIN}")
    if total is not None and have < total:
        raise requests.ConnectionError("the answer ended early")


def _announced(answer: requests.Response) -> int | None:
    """The whole file's size as the server states it, if it does."""
    if answer.status_code == 206:
        stated = re.search(r"/(\d+)$", answer.headers.get("Content-Range", ""))
        return int(stated[1]) if stated else None
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() and "Content-Encoding" not in answer.headers else None
