"""What all tests share."""

import contextlib
import importlib
import pkgutil

import pytest
from hypothesis import settings

import fallow

settings.register_profile("test", derandomize=True, deadline=None)
"""The same examples in every run, so that a change is judged by what it changed. `make fuzz` looks for others."""
settings.register_profile("search", max_examples=2_000, deadline=None, print_blob=True)
settings.load_profile("test")

for _module in pkgutil.walk_packages(fallow.__path__, "fallow."):
    # Hypothesis tries constants of the modules that are loaded: all of them are, so that the examples don't depend on what ran before.
    if not _module.name.endswith((".__main__", ".sql.env")):  # these two do their work when they are imported
        with contextlib.suppress(ImportError):
            importlib.import_module(_module.name)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
