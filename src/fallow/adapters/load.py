"""Heavy packages, loaded only where they are used."""

from fallow.adapters.fetch_job import Brought, Job
from fallow.model.weights import HttpsSource, HubSource, IndexSource


def hub_address(repository: str, file: str, revision: str, endpoint: str | None) -> tuple[str, dict[str, str]]:
    """The address of a file on the model hub, and the headers that carry the user's token if there is one."""
    from huggingface_hub import get_token, hf_hub_url

    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return hf_hub_url(repository, file, revision=revision, endpoint=endpoint), headers


def bring_from_index(job: Job, source: IndexSource, index_url: str | None) -> Brought:
    """`fetch_index.bring`, whose packages take as much memory as all of an agent that has its models already."""
    from fallow.adapters import fetch_index

    return fetch_index.bring(job, source, index_url)


def drop_wheels(job: Job, source: IndexSource) -> None:
    """`fetch_index.drop_wheels`."""
    from fallow.adapters import fetch_index

    fetch_index.drop_wheels(job, source)


def bring_over_http(job: Job, source: HttpsSource | HubSource, hub_url: str | None) -> Brought:
    """`fetch_web.bring`."""
    from fallow.adapters import fetch_web

    return fetch_web.bring(job, source, hub_url)
