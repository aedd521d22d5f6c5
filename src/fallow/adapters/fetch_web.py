"""A file over https, from its own address or from the model hub."""

from collections.abc import Callable

import requests

from fallow.adapters import fetch_hub
from fallow.adapters.address import host_of, is_private
from fallow.adapters.fetch_http import Address, Wanted, complete
from fallow.adapters.fetch_job import Brought, Job
from fallow.adapters.store import beside, size_of
from fallow.model.errors import FetchFailed
from fallow.model.weights import HttpsSource, HubSource


def bring(job: Job, source: HttpsSource | HubSource, hub_url: str | None) -> Brought:
    """Fetch it; raises FetchFailed."""
    match source:
        case HttpsSource():
            if not is_private(source.url):
                raise FetchFailed(f"the address of {job.model} is plain http, where anybody between could change it; use https")
            return _download(job, lambda session: Address(url=source.url), f"the server {host_of(source.url)}", "check the address")
        case HubSource():
            where = f"the hub's {source.repository}"
            return _download(job, lambda session: fetch_hub.locate(session, source, hub_url), where, "check the model's entry")


def _download(job: Job, locate: Callable[[requests.Session], Address], server: str, advice: str) -> Brought:
    with requests.Session() as session:
        wanted = Wanted(
            what=f"{job.model}'s {job.file.filename}",
            base=job.base,
            locate=lambda: locate(session),
            size_bytes=job.size_bytes,
            is_pinned=job.known is not None,
            finder=server,
            server=server,
            advice=advice,
            tell=lambda done, total: job.tell("download", done, total),
            room=lambda to_come: job.room(to_come, job.size_bytes or to_come + size_of(beside(job.base, ".part"))),
        )
        address = complete(session, wanted)
    return Brought(path=wanted.part, sha256=address.sha256 if address else None)
