"""Kneser-Ney against the textbook formula written with dictionaries, and against its own promises."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from nestling.core.errors import UserError
from nestling.lineage.ngram import KneserNey, unigram_entropy

END = 0


def _stream(seed: int, documents: int, vocab: int) -> np.ndarray:
    """Documents from a random, skewed Markov chain over tokens 1 … vocab − 1; some are empty."""
    rng = np.random.default_rng(seed)
    chain = rng.dirichlet(np.full(vocab - 1, 0.3), size=vocab)
    out = [END]
    for _ in range(documents):
        token = 0
        for _ in range(rng.integers(0, 14)):
            token = int(rng.choice(vocab - 1, p=chain[token])) + 1
            out.append(token)
        out.append(END)
    return np.array(out)


class Reference:
    """Slow and obvious: one dictionary of counts per order, recursion in float64."""

    def __init__(self, stream: np.ndarray, order: int, vocab: int) -> None:
        self.order, self.vocab = order, vocab
        raw: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order + 2)]
        ends = [place for place, token in enumerate(stream) if token == END]
        for a, b in pairwise(ends):
            document = stream[a : b + 1].tolist()
            for end in range(1, len(document)):
                for k in range(1, min(order, end + 1) + 1):
                    raw[k][tuple(document[end - k + 1 : end + 1])] += 1
        self.counts: list[dict[tuple[int, ...], int]] = [{} for _ in range(order + 1)]
        for k in range(1, order + 1):
            left = Counter(gram[1:] for gram in raw[k + 1]) if k < order else Counter()
            for gram, count in raw[k].items():
                keeps = k == order or (k > 1 and gram[0] == END)
                self.counts[k][gram] = count if keeps else left[gram]
        self.discount = [self._discounts(Counter(c.values())) for c in self.counts]
        self.after: list[dict[tuple[int, ...], list[int]]] = []
        for c in self.counts:
            after: dict[tuple[int, ...], list[int]] = defaultdict(list)
            for gram, count in c.items():
                after[gram[:-1]].append(count)
            self.after.append(after)

    @staticmethod
    def _discounts(n: Counter[int]) -> list[float]:
        if any(n[value] == 0 for value in (1, 2, 3, 4)):
            return [0, 0.75, 0.75, 0.75]
        y = n[1] / (n[1] + 2 * n[2])
        out = [0, *(value - (value + 1) * y * n[value + 1] / n[value] for value in (1, 2, 3))]
        return out if all(0 < out[value] < value for value in (1, 2, 3)) else [0, 0.75, 0.75, 0.75]

    def probability(self, history: tuple[int, ...], word: int) -> float:
        history = history[-(self.order - 1) :] if self.order > 1 else ()
        lower = self.probability(history[1:], word) if history else self._floor(word)
        return self._mix(len(history) + 1, history, word, lower)

    def _floor(self, word: int) -> float:
        return 1 / self.vocab

    def _mix(self, k: int, history: tuple[int, ...], word: int, lower: float) -> float:
        counts = self.after[k].get(history, [])
        if sum(counts) == 0:
            return lower
        d = self.discount[k]
        count = self.counts[k].get((*history, word), 0)
        gamma = sum(d[min(value, 3)] for value in counts) / sum(counts)
        return (count - d[min(count, 3)]) / sum(counts) + gamma * lower


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("documents", [3, 120])
def test_equals_the_formula(order: int, documents: int) -> None:
    vocab = 9
    train, test = _stream(0, documents, vocab), _stream(1, 12, vocab)
    model = KneserNey.train(train, end_of_text=END, vocab_size=vocab, order=order)
    reference = Reference(train, order, vocab)
    expected = []
    begin = 0
    for place in range(1, len(test)):
        expected.append(math.log2(reference.probability(tuple(test[begin:place].tolist()), int(test[place]))))
        begin = place if test[place] == END else begin
    np.testing.assert_allclose(model.log2_probability(test), expected, rtol=1e-5)


@pytest.mark.parametrize("order", [1, 3, 5])
def test_sums_to_one(order: int) -> None:
    model = KneserNey.train(_stream(0, 80, 9), end_of_text=END, vocab_size=9, order=order)
    for history in ([END], [END, 1], [END, 3, 4, 5, 6, 7], [END, 8, 8, 8, 8], [2, 2]):
        assert model.distribution(np.array(history)).sum() == pytest.approx(1, abs=1e-5)


def test_higher_orders_predict_better_and_histories_stay_in_their_document() -> None:
    train, test = _stream(0, 3000, 9), _stream(0, 3000, 9)[:4000]
    bits = [
        -KneserNey.train(train, end_of_text=END, vocab_size=9, order=order).log2_probability(test).mean()
        for order in (1, 2)
    ]
    assert bits[1] < bits[0] - 0.3
    model = KneserNey.train(train, end_of_text=END, vocab_size=9, order=5)
    one = model.log2_probability(np.array([END, 1, 2, END, 3, 4]))
    two = model.log2_probability(np.array([END, 5, 5, END, 3, 4]))
    assert one[-2:].tolist() == two[-2:].tolist()


def test_bits_per_byte_leaves_control_tokens_out() -> None:
    stream = np.array([END, 1, 2, END, 1, END])
    model = KneserNey.train(stream, end_of_text=END, vocab_size=3, order=2)
    log2 = model.log2_probability(stream)
    assert model.bits_per_byte(stream, [0, 1, 3]) == pytest.approx(-(log2[0] + log2[1] + log2[3]) / 5)


def test_unigram_entropy_of_a_fair_coin() -> None:
    assert unigram_entropy(np.array([1, 2, 1, 2]), 4) == 1.0


def test_bad_input() -> None:
    with pytest.raises(UserError, match=r"ngram\.order"):
        KneserNey.train(np.array([0, 1]), end_of_text=0, vocab_size=2, order=0)
    with pytest.raises(UserError, match="no text"):
        KneserNey.train(np.array([0]), end_of_text=0, vocab_size=2)
