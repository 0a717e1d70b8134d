"""Text that grows token by token: nothing shown is ever taken back, nothing is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nestling.generation.sequence import Watch
from nestling.tokenizer.bpe import Tokenizer

TOKENIZER = Tokenizer.train(["aab abb ba éa 🙂"], vocab_size=270)
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
