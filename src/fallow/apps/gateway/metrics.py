"""What the gateway counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fallow.apps.gateway.conversation import UNTAKEN, Untaken
from fallow.apps.gateway.errors import TABLE
from fallow.core import cards

OVERHEAD_BUCKETS = (0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.01, 0.025, 0.1, 1)


class Metrics:
    """The counters of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter("fallow_calls", "Calls by HTTP status.", ["status"], registry=self.registry)
        self._failed = Counter("fallow_attempts_failed", "Attempts that came to nothing, by code.", ["code"], registry=self.registry)
        self._tokens = Counter("fallow_tokens", "Tokens, by kind.", ["kind"], registry=self.registry)
        self._prompt = self._tokens.labels("prompt")
        self._output = self._tokens.labels("output")
        self._overhead = Histogram(
            "fallow_overhead_seconds", "Time added to the engine's own.", buckets=OVERHEAD_BUCKETS, registry=self.registry
        )
        refused = Counter("fallow_cards_refused", "Nodes' cards that weren't believed, by reason.", ["reason"], registry=self.registry)
        self._cards_refused = {reason: refused.labels(reason) for reason in cards.REASONS}
        answers = Counter("fallow_answers_refused", "Nodes' answers that weren't taken, by reason.", ["reason"], registry=self.registry)
        self._answers_refused = {reason: answers.labels(reason) for reason in UNTAKEN}
        self.under_way = Gauge("fallow_calls_under_way", "Calls that are being answered.", registry=self.registry)
        self.nodes = Gauge("fallow_nodes", "Nodes on the roster.", registry=self.registry)
        self._by_status: dict[int, Counter] = {}

    def call_ended(self, status: int, prompt_tokens: int, output_tokens: int) -> None:
        counter = self._by_status.get(status)
        if counter is None:
            counter = self._by_status[status] = self._calls.labels(str(status))
        counter.inc()
        if prompt_tokens or output_tokens:
            self._prompt.inc(prompt_tokens)
            self._output.inc(output_tokens)

    def overhead(self, seconds: float) -> None:
        self._overhead.observe(seconds)

    def attempt_failed(self, code: str) -> None:
        self._failed.labels(code if code in TABLE else "other").inc()

    def card_refused(self, reason: cards.Reason) -> None:
        self._cards_refused[reason].inc()

    def answer_refused(self, reason: Untaken) -> None:
        self._answers_refused[reason].inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
