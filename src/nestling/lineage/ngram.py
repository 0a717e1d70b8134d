"""The statistical language model: interpolated, modified Kneser-Ney (Chen and Goodman 1999), in vectorised numpy.

    p(w | h) = (c(h w) − D(c)) / Σ c(h ·) + γ(h) p(w | h')        h' = h without its first token

At the highest order c counts occurrences; below, it counts how many different tokens stand before "h w". N-grams that
begin a document have nothing before them and keep their occurrences, as in KenLM. The last resort is 1 / V.

Token streams are those of the shards:  e d₁ e d₂ e.  An n-gram contains e only as its first or its last token, so no
history reaches over a document's beginning: the same view that a transformer with document masking has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nestling.core.errors import UserError


@dataclass(frozen=True)
class _Order:
    """The n-grams of one order k, sorted by key = (index of the first k − 1 tokens) · V + last token."""

    keys: np.ndarray
    """[G] int64."""
    share: np.ndarray
    """[G] float32: (c − D(c)) / Σ c of the history."""
    backoff: np.ndarray
    """[H] float32 by the index of the history: γ, or 1 for a history that nothing follows."""


class KneserNey:
    """An n-gram model over token ids.

    >>> stream = np.array([0, 1, 2, 0, 1, 2, 0])     # two documents "1 2"; 0 is end-of-text
    >>> model = KneserNey.train(stream, end_of_text=0, vocab_size=4, order=2)
    >>> model.log2_probability(stream).shape
    (6,)
    """

    def __init__(self, orders: list[_Order], end_of_text: int, vocab_size: int) -> None:
        self.orders, self.end_of_text, self.vocab_size = orders, end_of_text, vocab_size

    @classmethod
    def train(cls, ids: np.ndarray, *, end_of_text: int, vocab_size: int, order: int = 5) -> KneserNey:
        """Count and discount.

        Args:
            ids: [N] a token stream that begins with end-of-text and has one after each document.
            vocab_size: V; the last resort spreads over all of them.

        Raises:
            UserError: a stream without text, or an order below 1.
        """
        if order < 1:
            raise UserError("the order of an n-gram model is at least 1", where="ngram.order", value=order)
        if len(ids) < 2:
            raise UserError("no text to count n-grams in", where="ngram")
        counted = _count(np.asarray(ids, dtype=np.int64), end_of_text, vocab_size, order)
        histories = [1] + [len(keys) for keys, _ in counted]
        histories[1] = vocab_size  # a history of one token is its id
        orders = [_discounted(keys, counts, vocab_size, histories[k]) for k, (keys, counts) in enumerate(counted)]
        return cls(orders, end_of_text, vocab_size)

    def log2_probability(self, ids: np.ndarray) -> np.ndarray:
        """log2 p of each token of a stream given those before it in its document.

        Args:
            ids: [N] a stream that begins with end-of-text.

        Returns:
            [N − 1] float64, for ids[1:].
        """
        tokens = np.asarray(ids, dtype=np.int64)
        reach = _reach(tokens, self.end_of_text)
        probability = np.full(len(tokens), 1 / self.vocab_size)
        gram = np.zeros(len(tokens) + 1, dtype=np.int64)  # the index of the history that ends just before each token
        for k, table in enumerate(self.orders, start=1):
            history = np.where(reach >= k, gram[:-1], -1)
            known = history >= 0
            keys = np.where(known, history * self.vocab_size + tokens, -1)
            place = np.minimum(np.searchsorted(table.keys, keys), len(table.keys) - 1)
            seen = table.keys[place] == keys
            probability *= np.where(known, table.backoff[history], 1.0)
            probability += np.where(seen, table.share[place], 0.0)
            gram[1:] = tokens if k == 1 else np.where(seen, place, -1)
            gram[0] = -1
        return np.log2(probability[1:])

    def distribution(self, history: np.ndarray) -> np.ndarray:
        """p of every token after `history` (ids from the document's end-of-text on), [V]."""
        history = np.asarray(history, dtype=np.int64)[-max(1, len(self.orders) - 1) :]
        lead = history if len(history) else np.array([self.end_of_text])
        rows = [self.log2_probability(np.append(lead, token))[-1] for token in range(self.vocab_size)]
        return np.exp2(np.array(rows))

    def bits_per_byte(self, ids: np.ndarray, byte_lengths: np.ndarray | list[int]) -> float:
        """Bits per byte of text; end-of-text tokens count neither as bits nor as bytes.

        Args:
            ids: [N] a stream that begins with end-of-text.
            byte_lengths: [V] bytes of each id, 0 for control tokens.
        """
        sizes = np.asarray(byte_lengths)[np.asarray(ids)[1:]]
        bits = -self.log2_probability(ids)
        return float(bits[sizes > 0].sum() / sizes.sum())


def unigram_entropy(ids: np.ndarray, vocab_size: int) -> float:
    """Bits per token of the empirical distribution of single tokens: what is left without any context."""
    counts = np.bincount(np.asarray(ids, dtype=np.int64), minlength=vocab_size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def _reach(tokens: np.ndarray, end_of_text: int) -> np.ndarray:
    """[N] the longest n-gram that may end at each place: back to the end-of-text before it, inclusive. 0 at place 0."""
    places = np.arange(len(tokens))
    last = np.maximum.accumulate(np.where(tokens == end_of_text, places, 0))
    before = np.concatenate([[0], last[:-1]])
    reach = places - before + 1
    reach[0] = 0
    return reach


def _count(tokens: np.ndarray, end_of_text: int, vocab_size: int, order: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each order, sorted keys of its n-grams and their adjusted counts.

    Order k + 1 tells order k how many different tokens stand before each of its n-grams, so a count is settled one
    round after its n-grams were found.
    """
    reach = _reach(tokens, end_of_text)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    index = previous = np.zeros(len(tokens), dtype=np.int64)  # by place: which n-gram of the order below ends there
    opens = np.zeros(0, dtype=bool)
    for k in range(1, order + 1):
        ends = np.flatnonzero(reach >= k)
        keys, first, inverse, counts = np.unique(
            (previous[ends - 1] if k > 1 else 0) * vocab_size + tokens[ends],
            return_index=True, return_inverse=True, return_counts=True,
        )  # fmt: skip
        if found:
            _set_continuations(found[-1][1], index, ends[first], opens)
        index = np.full(len(tokens), -1, dtype=np.int64)
        index[ends] = inverse
        previous = tokens if k == 1 else index
        opens = tokens[ends[first] - (k - 1)] == end_of_text if k > 1 else np.zeros(len(keys), dtype=bool)
        found.append((keys, counts))
    return found


def _set_continuations(counts: np.ndarray, index: np.ndarray, longer_ends: np.ndarray, opens: np.ndarray) -> None:
    """Replace occurrences by the number of different left neighbours, except for n-grams that open a document."""
    neighbours = np.bincount(index[longer_ends], minlength=len(counts))
    counts[:] = np.where(opens, counts, neighbours)


def _discounted(keys: np.ndarray, counts: np.ndarray, vocab_size: int, histories: int) -> _Order:
    """Shares and backoff weights from adjusted counts."""
    history = keys // vocab_size
    total = np.bincount(history, weights=counts, minlength=histories)
    discount = _discounts(counts)[np.minimum(counts, 3)]
    freed = np.bincount(history, weights=discount, minlength=histories)
    followed = total > 0
    share = (counts - discount) / total[history]
    backoff = np.divide(freed, total, out=np.ones(histories), where=followed)
    return _Order(keys, share.astype(np.float32), backoff.astype(np.float32))


def _discounts(counts: np.ndarray) -> np.ndarray:
    """D(0) = 0, D(1), D(2), D(3+) from the counts of counts (Chen and Goodman, equation 26).

    A text too small to estimate them (one of the first four counts of counts is 0, or a D out of range) gets 0.75,
    Ney's usual value.
    """
    n1, n2, n3, n4 = (float((counts == value).sum()) for value in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return np.array([0, 0.75, 0.75, 0.75])
    y = n1 / (n1 + 2 * n2)
    estimated = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    in_range = (estimated[1:] > 0).all() and (estimated[1:] < [1, 2, 3]).all()
    return estimated if in_range else np.array([0, 0.75, 0.75, 0.75])
