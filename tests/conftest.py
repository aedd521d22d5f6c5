"""What all tests share."""

import pytest
from hypothesis import settings

settings.register_profile("test", derandomize=True, deadline=None)
"""The same examples in every run, so that a change is judged by what it changed. `make fuzz` looks for others."""
settings.register_profile("search", max_examples=2_000, deadline=None, print_blob=True)
settings.load_profile("test")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
