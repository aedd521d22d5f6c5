"""How long answers become: learnt per key and model, and finer where the caller gave a limit."""

import math
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from fallow.core.match.columns import Floats
from fallow.model.ids import KeyId

BINS_PER_DOUBLING = 4
DOUBLINGS = 14
KEYS_MAX = 4_096
"""Histograms that are remembered, about 500 bytes each; the least recently used is forgotten."""
PRIOR_WEIGHT = 5.0
"""How many answers it takes until what was seen outweighs what was believed before."""
PRIOR_MEDIAN_TOKENS = 180.0
PRIOR_DOUBLINGS = 1.8
"""One standard deviation of the belief about a key that nobody knows."""
HALF_LIFE_ANSWERS = 500
"""After so many answers of a key an old one counts half."""

_EDGES: Floats = 2.0 ** (np.arange(DOUBLINGS * BINS_PER_DOUBLING + 1) / BINS_PER_DOUBLING)
_MIDDLE: Floats = np.sqrt(_EDGES[1:] * _EDGES[:-1])
_FADE = 0.5 ** (1 / HALF_LIFE_ANSWERS)
_BELIEF: Floats = np.exp(-0.5 * ((np.log2(_MIDDLE) - math.log2(PRIOR_MEDIAN_TOKENS)) / PRIOR_DOUBLINGS) ** 2)

Name = tuple[KeyId, str, int | None]


class Length(NamedTuple):
    """What is believed of an answer's length: the mean in tokens, and the chance of each bin and all below it."""

    mean_tokens: float
    cumulative: Floats

    def below(self, tokens: Floats) -> Floats:
        """The chance that the answer has at most so many tokens."""
        bins = np.log2(np.maximum(tokens, 2.0 ** (-1 / BINS_PER_DOUBLING))) * BINS_PER_DOUBLING
        at = np.minimum(bins, len(self.cumulative) - 1.0).astype(np.intp)
        found: Floats = np.where(tokens < 1.0, 0.0, self.cumulative[np.maximum(at, 0)])
        return found


def _class(limit: int | None) -> int | None:
    """Limits are told apart by doublings."""
    return None if limit is None else math.ceil(math.log2(max(1, limit)))


def _bin(tokens: int) -> int:
    return min(len(_MIDDLE) - 1, int(math.log2(max(1, tokens)) * BINS_PER_DOUBLING))


class Lengths:
    """Histograms of the answers that were seen."""

    def __init__(self) -> None:
        self._seen: OrderedDict[Name, Floats] = OrderedDict()
        self._all: Floats = _BELIEF * (4 * PRIOR_WEIGHT / _BELIEF.sum())
        self._known: OrderedDict[tuple[KeyId, str], dict[int | None, Length]] = OrderedDict()

    def learn(self, key_id: KeyId, model: str, *, limit: int | None, tokens: int) -> None:
        """An answer of so many tokens came to its end."""
        self._all *= _FADE
        self._all[_bin(tokens)] += 1
        for name in {(key_id, model, None), (key_id, model, _class(limit))}:
            seen = self._seen.get(name)
            if seen is None:
                seen = self._seen[name] = np.zeros(len(_MIDDLE))
                if len(self._seen) > KEYS_MAX:
                    self._seen.popitem(last=False)
            else:
                self._seen.move_to_end(name)
            seen *= _FADE
            seen[_bin(tokens)] += 1
        self._known.pop((key_id, model), None)

    def expected(self, key_id: KeyId, model: str, *, limit: int | None) -> Length:
        """What to expect of the next answer. None of it is beyond the limit."""
        mine = self._known.get((key_id, model))
        if mine is None:
            mine = self._known[key_id, model] = {}
            if len(self._known) > KEYS_MAX:
                self._known.popitem(last=False)
        known = mine.get(_class(limit))
        if known is None:
            known = mine[_class(limit)] = self._believed((key_id, model, _class(limit)))
        return known if limit is None or known.mean_tokens <= limit else Length(float(limit), known.cumulative)

    def _believed(self, name: Name) -> Length:
        key_id, model, limit = name
        nothing = np.zeros(len(_MIDDLE))
        belief = self._seen.get((key_id, model, None), nothing) + self._all * (PRIOR_WEIGHT / self._all.sum())
        if limit is not None:
            within = belief.copy()
            last = min(len(within) - 1, limit * BINS_PER_DOUBLING)
            within[last] += within[last + 1 :].sum() * 0.1  # most callers set a limit that they don't meet
            within[last + 1 :] = 0.0
            belief = self._seen.get(name, nothing) + within * (PRIOR_WEIGHT / max(within.sum(), 1e-9))
        chances = belief / belief.sum()
        return Length(float((chances * _MIDDLE).sum()), np.minimum(1.0, np.cumsum(chances)))
