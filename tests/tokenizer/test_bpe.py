"""The tokenizer against two other implementations (tokenizers, transformers) and on hostile text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.core.errors import UserError
from nestling.core.runtime import data_root
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.special import CHAT, END_OF_TEXT

TEXTS = [
    "Once upon a time there was a little fox who couldn't find 12345 berries.\n\nShe'd look again, wouldn't she?",
    "白日依山盡，黃河入海流。欲窮千里目，更上一層樓。 " * 3,
    "def f(x):\n    return x + 1\n\n\nprint(f(41))   # forty-two\r\n" * 4,
    "the cat sat on the mat and the dog sat on the log; THE END'S NEAR'LL " * 20,
]
# Text that stresses the cutting pattern: blanks, digits, contractions, letters that fold to ASCII, combining marks.
TRICKY = st.text(st.sampled_from(" \t\n\r\x0b\x1c\x85\u00a0\u3000aZ'sſK9٣½é́中🦊🏽‍<|>im_\u0600ß")) | st.text()


@pytest.fixture(scope="module", params=[("gpt4", 1), ("gpt4", 3), ("gpt2", 1)], ids=str)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    pattern, digits = request.param
    return Tokenizer.train(TEXTS, 420, pattern=pattern, digits=digits)


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer.train(TEXTS, 420)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    folder = data_root() / "gpt2"
    if not folder.exists():
        pytest.skip(f"GPT-2's vocabulary is not at {folder}; set NESTLING_DATA")
    return Tokenizer.from_gpt2(folder / "vocab.json", folder / "merges.txt")


def test_round_trip_and_fast_equals_slow(tokenizer: Tokenizer) -> None:
    assert tokenizer.is_fast

    @settings(max_examples=400, deadline=None)
    @given(TRICKY)
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer._codec._plain.encode(text, add_special_tokens=False).ids
        assert ids == tokenizer.encode_batch([text])[0]

    check()


def test_gpt2_gives_the_published_ids(gpt2: Tokenizer) -> None:
    ids = gpt2.encode("Write a story about number 1234567.")
    assert ids == [16594, 257, 1621, 546, 1271, 17031, 2231, 3134, 13]
    assert (gpt2.vocab_size, gpt2.end_of_text, gpt2.is_fast) == (50257, 50256, True)


def test_gpt2_fast_equals_slow(gpt2: Tokenizer) -> None:
    @settings(max_examples=200, deadline=None)
    @given(TRICKY)
    def check(text: str) -> None:
        assert gpt2.encode(text) == gpt2._codec._plain.encode(text, add_special_tokens=False).ids

    check()


@pytest.mark.parametrize("model_type", [None, "qwen3", "llama", "gpt2"])
def test_transformers_reads_the_folder(small: Tokenizer, tmp_path: Path, model_type: str | None) -> None:
    transformers = pytest.importorskip("transformers")
    chat = small.with_special(CHAT)
    chat.save(tmp_path, context=128)
    if model_type:
        (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, " x  y\n\n z ", "🦊 can't 123456"):
        assert theirs.encode(text, add_special_tokens=False) == chat.encode(text)
        assert theirs.decode(chat.encode(text)) == text
    assert len(theirs) == chat.vocab_size
    assert theirs.convert_tokens_to_ids("<|im_end|>") == theirs.eos_token_id == chat.id("<|im_end|>")
    assert (theirs.pad_token, theirs.model_max_length) == ("<|pad|>", 128)


def test_transformers_reads_gpt2_saved(gpt2: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    gpt2.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "Write a story about number 1234567. Naïve café 🦊\n\n  done"
    assert theirs.encode(text) == gpt2.encode(text)
    assert Tokenizer.load(tmp_path).encode(text) == gpt2.encode(text)
    assert theirs.eos_token_id == 50256


def test_control_words_in_text_stay_text(small: Tokenizer, gpt2: Tokenizer) -> None:
    for tokenizer in (small.with_special(CHAT), gpt2.with_special(CHAT), Tokenizer.characters(["<|im_start|>"])):
        tokenizer = tokenizer.with_special(CHAT)
        for name in (END_OF_TEXT, *CHAT):
            for text in (name, f"a{name}b", f" {name}\n", name * 2):
                ids = tokenizer.encode(text)
                assert not set(ids) & set(tokenizer.special.values())
                assert tokenizer.decode(ids) == text


def test_appended_tokens_keep_all_ids_and_the_text_hash(small: Tokenizer) -> None:
    chat = small.with_special(CHAT)
    assert [chat.id(name) for name in CHAT] == list(range(small.vocab_size, small.vocab_size + len(CHAT)))
    assert chat.encode(TEXTS[0]) == small.encode(TEXTS[0])
    assert chat.text_hash == small.text_hash
    assert chat.hash != small.hash
    assert chat.with_special(CHAT).hash == chat.hash


def test_save_and_load_is_identity(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.hash == tokenizer.hash
    assert again.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])


def test_training_is_deterministic_and_digits_stay_apart(small: Tokenizer) -> None:
    assert Tokenizer.train(TEXTS, 420).hash == small.hash
    assert [piece.text for piece in small.view("12345")] == list("12345")


def test_byte_lengths_count_text_only(small: Tokenizer) -> None:
    ids = small.encode(TEXTS[1])
    assert sum(small.byte_lengths[number] for number in ids) == len(TEXTS[1].encode())
    assert small.byte_lengths[small.end_of_text] == 0
    assert len(small.byte_lengths) == small.vocab_size


def test_decode_replaces_broken_utf8_and_hides_control(small: Tokenizer) -> None:
    ids = small.encode("é")
    assert small.decode(ids[:1]) == "\ufffd" or len(ids) == 1
    assert small.decode([small.end_of_text, *small.encode("a")]) == "a"
    assert small.decode([small.end_of_text], control=True) == END_OF_TEXT


def test_long_runs_of_blanks_do_not_end_the_process(small: Tokenizer) -> None:
    text = "a" + " " * 200_000 + "b"
    assert small.decode(small.encode(text)) == text
    assert small.encode_batch([text])[0] == small.encode(text)


def test_view_shows_control_and_partial_characters(small: Tokenizer) -> None:
    pieces = small.view([*small.encode("🦊"), small.end_of_text])
    assert b"".join(piece.bytes for piece in pieces) == "🦊".encode()
    assert pieces[-1].control
    assert pieces[-1].text == END_OF_TEXT


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Tokenizer.train(["a"], 256), "tokenizer.vocab_size"),
        (lambda: Tokenizer.train(["a"], 300, digits=4), "tokenizer.digits"),
        (lambda: Tokenizer.train(["a"], 300, pattern="gpt5"), "tokenizer.pattern"),  # type: ignore[arg-type]
        (lambda: Tokenizer.train(["ok", "a\ud800b"], 300), "character 1"),
        (lambda: Tokenizer.train(["a"], 257).encode("ab\udfff"), "U+DFFF at character 2"),
        (lambda: Tokenizer.train(["a"], 257).encode_batch(["ab\udfff"]), "U+DFFF at character 2"),
        (lambda: Tokenizer.train(["a"], 257).id("<|im_start|>"), "<|im_start|>"),
        (lambda: Tokenizer.load("/nowhere"), "tokenizer.json"),
        (lambda: Tokenizer({"model": {"type": "WordPiece"}}), "WordPiece"),
        (lambda: Tokenizer.characters(["abc"], byte_fallback=False).encode("abz"), "character 2"),
    ],
)
def test_bad_input_is_one_line(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
