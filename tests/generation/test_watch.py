"""Text that grows token by token: nothing shown is ever taken back, nothing is lost."""

from __future__ import annotations

from itertools import accumulate, chain

from hypothesis import given
from hypothesis import strategies as st

from nestling.generation.sequence import Piece, TokenLog, Watch
from nestling.tokenizer.bpe import Tokenizer

TOKENIZER = Tokenizer.train(["aab abb ba éa 🙂"], vocab_size=270).with_special(["<|call|>", "<|think|>"])
TEXTS = st.text("ab é🙂", max_size=30)


@given(TEXTS, st.lists(st.text("ab é🙂", min_size=1, max_size=4), max_size=3))
def test_released_text_is_what_stands_before_the_first_stop_text(text: str, stops: list[str]) -> None:
    watch = Watch(TOKENIZER, stops)
    shown, hit = "", False
    for token in TOKENIZER.encode(text):
        hit = watch.push(token)
        shown += "".join(piece.text for piece in watch.take())
        assert "\ufffd" not in shown
        if hit:
            break
    else:
        watch.flush()
        shown += "".join(piece.text for piece in watch.take())
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    assert hit == bool(found)
    assert shown == watch.text
    if found:
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
        assert any(text.startswith(stop, len(shown)) for stop in stops)
    else:
        assert shown == text


ONE = st.integers(0, TOKENIZER.vocab_size - 1).map(lambda token: [token])
IDS = st.lists(st.one_of(TEXTS.map(TOKENIZER.encode), ONE), max_size=6).map(lambda parts: [*chain(*parts)][:24])
SIZES = st.lists(st.integers(1, 6), min_size=24, max_size=24)


@given(IDS, SIZES, st.booleans())
def test_tokens_read_together_show_what_they_show_one_by_one(ids: list[int], sizes: list[int], stops: bool) -> None:
    """Control tokens, cut characters and bytes that are no text among them; each token belongs to exactly one piece."""
    logs = [TokenLog(token, -float(place)) for place, token in enumerate(ids)]
    alone, together = (Watch(TOKENIZER, ["ab"] if stops else []) for _ in range(2))
    hit = any(alone.push(log.id, log=log) for log in logs)
    hit_together, start = False, 0
    for size in sizes:
        if (part := logs[start : start + size]) and not hit_together:
            hit_together = together.read(part)
        start += size
    for watch in (alone, together):
        watch.flush()
    assert hit == hit_together
    assert alone.text == together.text
    shown, joined = alone.take(), together.take()
    assert "".join(piece.text for piece in shown) == "".join(piece.text for piece in joined)
    assert [log for piece in shown for log in piece.tokens] == [log for piece in joined for log in piece.tokens]
    assert [piece for piece in shown if piece.control] == [piece for piece in joined if piece.control]
    ends, ends_together = _ends(shown), _ends(joined)
    assert all(ends_together[log] >= end for log, end in ends.items())


def _ends(pieces: list[Piece]) -> dict[TokenLog, int]:
    """How much text is shown with each token, which holds its last character."""
    lengths = accumulate(len(piece.text) for piece in pieces)
    return {log: length for piece, length in zip(pieces, lengths, strict=True) for log in piece.tokens}
