"""The fixtures of the acceptance tests; the helpers are in running, where tests can import them."""

from running import apart, client, service, weights
from second_server import second

__all__ = ["apart", "client", "second", "service", "weights"]
