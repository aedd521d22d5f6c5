"""The working replicas of one model: how much of the demand they carry, and how they stand together."""

from collections import defaultdict
from typing import NamedTuple

from fallow.core.demand import Wanted
from fallow.core.supply import ModelSupply, NodeSupply
from fallow.model.ids import NodeId

TARGET_UTILISATION = 0.7
"""How much of its speed a replica is planned to use: beyond it, calls wait for each other more and more."""
PREFILL_TOKENS_PER_S = 100.0
DECODE_TOKENS_PER_S = 10.0
"""What a replica is taken to do that wasn't measured: a slow machine."""
WORK_MIN = 1e-9
GAIN_MIN = 0.3
"""How much more a change must be worth than what it gives up."""

Crowd = tuple[int, int, int]
"""How many replicas are in a node's organisation, network and region; none in one that isn't known."""


class Worth(NamedTuple):
    """What a replica is worth: whether it is the only one, and how many calls a second it takes beyond the others."""

    is_only: bool
    calls_per_s: float

    def outweighs(self, other: "Worth") -> bool:
        """Whether it is worth giving up the other for this one."""
        if self.is_only != other.is_only:
            return self.is_only
        return self.calls_per_s > (1 + GAIN_MIN) * other.calls_per_s


class Replicas:
    """`shares` has the part of the demand that each carries, `carried` their sum: it should be `wanted.spare` times all of it."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.shares: dict[NodeId, float] = {}
        self.carried = 0.0
        self._in: tuple[defaultdict[str, int], ...] = (defaultdict(int), defaultdict(int), defaultdict(int))

    def share(self, offer: ModelSupply) -> float:
        """The part of the demand that a replica carries at the target utilisation; above 1 if it could carry more than all of it.

        A second of demand takes `prompt ÷ prefill + output ÷ decode` seconds of the replica's time.
        """
        prompt_s = self.wanted.prompt_tokens_per_s / (offer.prefill_tokens_per_s or PREFILL_TOKENS_PER_S)
        output_s = self.wanted.output_tokens_per_s / (offer.decode_tokens_per_s or DECODE_TOKENS_PER_S)
        return TARGET_UTILISATION / (prompt_s + output_s or WORK_MIN)

    def join(self, node: NodeSupply, offer: ModelSupply) -> None:
        """One more."""
        self.shares[node.node_id] = share = self.share(offer)
        self.carried += share
        self._count(node, 1)

    def part(self, node: NodeSupply) -> None:
        """One less."""
        self.carried -= self.shares.pop(node.node_id)
        self._count(node, -1)

    def _count(self, node: NodeSupply, change: int) -> None:
        for counts, name in zip(self._in, (node.org_id, node.network, node.region), strict=True):
            if name:
                counts[name] += change

    def crowd(self, node: NodeSupply) -> Crowd:
        """Who is in its failure domains."""
        orgs, networks, regions = self._in
        return orgs.get(node.org_id, 0), networks.get(node.network, 0), regions.get(node.region, 0)

    def is_short(self) -> bool:
        """Whether there should be more: one while anybody asks, and enough for the demand."""
        return len(self.shares) < self._least() or self.carried < self.wanted.spare

    def lack(self) -> float:
        """Calls per second that nobody carries."""
        return self.wanted.calls_per_s * max(0.0, 1 - self.carried / self.wanted.spare)

    def gain(self, offer: ModelSupply) -> Worth:
        """What one more is worth."""
        calls = self.wanted.calls_per_s
        if not self.shares:
            return Worth(True, calls)
        return Worth(False, min(self.lack(), calls * self.share(offer) / self.wanted.spare))

    def loss(self, node_id: NodeId) -> Worth:
        """What one of them is worth; nothing where its owner needs the node."""
        mine, calls = self.shares.get(node_id), self.wanted.calls_per_s
        if mine is None:
            return Worth(False, 0.0)
        if len(self.shares) == 1:
            return Worth(True, calls)
        carried, spare = self.carried, self.wanted.spare
        return Worth(False, calls * (min(1.0, carried / spare) - min(1.0, (carried - mine) / spare)))

    def can_spare(self, node_id: NodeId) -> bool:
        """Whether clearly enough is left without it."""
        left = self.carried - self.shares[node_id]
        return len(self.shares) > self._least() and left >= (1 + GAIN_MIN) * self.wanted.spare

    def _least(self) -> int:
        """While calls are missed although the demand is carried, more replicas than one."""
        return max(1, int(self.wanted.spare))
