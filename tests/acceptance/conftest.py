"""The fixtures of the acceptance tests; the helpers are in running, where tests can import them."""

from running import apart, client, service, weights

__all__ = ["apart", "client", "service", "weights"]
