"""Heavy packages, loaded only where they are used."""


def hub_address(repository: str, file: str, revision: str, endpoint: str | None) -> tuple[str, dict[str, str]]:
    """The address of a file on the model hub, and the headers that carry the user's token if there is one."""
    from huggingface_hub import get_token, hf_hub_url

    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return hf_hub_url(repository, file, revision=revision, endpoint=endpoint), headers
