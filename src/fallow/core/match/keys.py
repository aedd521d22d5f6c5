"""What is remembered of each API key: where the beginnings of its prompts are warm, and how long its prompts really are."""

from collections import OrderedDict

from fallow.core import prefix
from fallow.core.match.rows import Rows
from fallow.model.call import Call
from fallow.model.ids import KeyId, NodeId

KEYS_MAX = 4_096
WARM_NODES_MAX = 8
"""Per key and model, the nodes whose engines may still know the beginning of a prompt."""
PROMPT_RATE = 0.1
PROMPT_FACTOR_MIN, PROMPT_FACTOR_MAX = 0.1, 10.0

KeyModel = tuple[KeyId, str]


class Warmth:
    """Which node saw which beginning last, per key and model. One key's beginnings say nothing about another's."""

    def __init__(self) -> None:
        self._known: OrderedDict[KeyModel, OrderedDict[NodeId, prefix.Blocks]] = OrderedDict()

    def put(self, call: Call, model: str, node_id: NodeId) -> None:
        """The call goes to the node."""
        if not call.prefix:
            return
        known = self._known.setdefault((call.key_id, model), OrderedDict())
        known[node_id] = call.prefix
        known.move_to_end(node_id)
        self._known.move_to_end((call.key_id, model))
        while len(known) > WARM_NODES_MAX:
            known.popitem(last=False)
        while len(self._known) > KEYS_MAX:
            self._known.popitem(last=False)

    def of(self, call: Call, rows: Rows, prompt: float) -> dict[int, float]:
        """By row, how many of the prompt's tokens an engine probably still knows from this key."""
        known = self._known.get((call.key_id, rows.model))
        if not known or not call.prefix or not call.body_bytes:
            return {}
        found = {}
        for node_id, blocks in known.items():
            row = rows.row_of.get(node_id)
            same = prefix.common(blocks, call.prefix) if row is not None else 0
            if row is not None and same:
                found[row] = min(prompt - 1.0, prompt * same * prefix.BLOCK_BYTES / call.body_bytes)
        return found


class Prompts:
    """How many times longer than their bytes suggest the prompts of a key are, for a model."""

    def __init__(self) -> None:
        self._factors: OrderedDict[KeyModel, float] = OrderedDict()

    def tokens(self, call: Call) -> float:
        """The prompt's probable length."""
        return max(1.0, call.needs.prompt_tokens * self._factors.get((call.key_id, call.needs.model), 1.0))

    def learn(self, call: Call, prompt_tokens: int) -> None:
        """The prompt turned out to have so many tokens."""
        if not prompt_tokens or not call.needs.prompt_tokens:
            return
        name = (call.key_id, call.needs.model)
        known = self._factors.get(name, 1.0)
        seen = min(PROMPT_FACTOR_MAX, max(PROMPT_FACTOR_MIN, prompt_tokens / call.needs.prompt_tokens))
        self._factors[name] = known * (seen / known) ** PROMPT_RATE
        self._factors.move_to_end(name)
        if len(self._factors) > KEYS_MAX:
            self._factors.popitem(last=False)
