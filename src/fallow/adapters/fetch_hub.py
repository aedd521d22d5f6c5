"""A file of the model hub: where it is, and what the hub says of it."""

import re

import requests

from fallow.adapters import load
from fallow.adapters.fetch_http import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, Address
from fallow.adapters.memory import AGAIN
from fallow.model.errors import FetchFailed
from fallow.model.weights import HubSource

_LFS_ETAG = re.compile(r'^"?([0-9a-f]{64})"?$')


def locate(session: requests.Session, source: HubSource, hub_url: str | None) -> Address:
    """The file's address with the user's token, and its checksum and size as the hub states them; raises FetchFailed."""
    url, headers = load.hub_address(source.repository, source.file, source.revision, hub_url)
    headers["Accept-Encoding"] = "identity"
    with session.head(url, headers=headers, allow_redirects=False, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S)) as answer:
        moved = answer.headers.get("Location", "")
        if answer.is_redirect and moved.startswith("/"):  # a repository that has been renamed
            url = requests.compat.urljoin(url, moved)
            with session.head(url, headers=headers, allow_redirects=False, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S)) as again:
                return _read(again, url, headers, source)
        return _read(answer, url, headers, source)


def _read(answer: requests.Response, url: str, headers: dict[str, str], source: HubSource) -> Address:
    what = f"{source.repository}/{source.file}"
    kind = answer.headers.get("X-Error-Code", "")
    if kind == "GatedRepo" or answer.status_code == 403:
        raise FetchFailed(
            f"the hub gives {source.repository} only to users who accepted its terms there; accept them at {url.split('/resolve/')[0]}, "
            f"log in with `hf auth login` and {AGAIN}"
        )
    if kind == "EntryNotFound":
        raise FetchFailed(f"the hub has no file {source.file} in {source.repository}; name another with `fallow models add`")
    if kind == "RevisionNotFound":
        raise FetchFailed(f"the hub has no revision {source.revision} of {source.repository}; name another with `fallow models add`")
    if kind == "RepoNotFound" or answer.status_code in {401, 404}:
        raise FetchFailed(
            f"the hub has no {what}, or shows it only to users who are logged in; check the name, or log in with `hf auth login`"
        )
    if not answer.is_redirect:
        answer.raise_for_status()
    stated = _LFS_ETAG.match(answer.headers.get("X-Linked-Etag", ""))
    size = answer.headers.get("X-Linked-Size") or ("" if answer.is_redirect else answer.headers.get("Content-Length", ""))
    return Address(
        url=url, headers=headers, sha256=stated[1] if stated else None, size_bytes=int(size) if size.isdecimal() and int(size) else None
    )
