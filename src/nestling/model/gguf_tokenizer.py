"""A tokenizer in GGUF's words: tokens, kinds, merges, how text is cut, special ids and the chat template.

llama.cpp knows no regular expressions of a file; it has a list of names for the ways published models cut text. A pattern
that is not on the list can't be exported: tokens would differ silently.
"""

from __future__ import annotations

from typing import Any

from nestling.core.errors import UserError
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.bytelevel import split_regex
from nestling.tokenizer.patterns import split_pattern
from nestling.tokenizer.special import PAD, TURN_END

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""llama.cpp's kinds of tokens."""


def write_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Everything about the tokenizer, into a `gguf.GGUFWriter`.

    Args:
        vocab_size: ids of the model; those that the tokenizer doesn't use are filled.

    Raises:
        UserError: llama.cpp doesn't know how this tokenizer cuts text, or it is no byte-level BPE.
    """
    tokens, kinds = _tokens(tokenizer, vocab_size)
    merges = tokenizer.definition["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut_name(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_add_bos_token(False)
    end = tokenizer.special.get(TURN_END, tokenizer.end_of_text)
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(end)
    if PAD in tokenizer.special:
        writer.add_pad_token_id(tokenizer.special[PAD])
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def cut_name(tokenizer: Tokenizer) -> str:
    """llama.cpp's name for the way this tokenizer cuts text ("pre-tokenizer").

    Raises:
        UserError: it has none.
    """
    regex = split_regex(tokenizer.definition)
    whole_words_first = bool(tokenizer.definition["model"].get("ignore_merges"))
    names = {
        split_pattern("gpt2"): "gpt-2",
        split_pattern("gpt4", 1): "qwen2",
        split_pattern("gpt4", 3): "llama-bpe" if whole_words_first else "smaug-bpe",
    }
    if regex not in names or not tokenizer.definition["model"]["merges"]:
        raise UserError(
            "llama.cpp has no name for the way this tokenizer cuts text", where="gguf", value=regex,
            fix="train the tokenizer with pattern gpt2, or gpt4 with digits 1 or 3",
        )  # fmt: skip
    if whole_words_first and names[regex] != "llama-bpe" and not tokenizer.is_fast:
        raise UserError("llama.cpp takes whole words before merges only where text is cut as Llama 3 does", where="gguf")
    return names[regex]


def _tokens(tokenizer: Tokenizer, vocab_size: int) -> tuple[list[str], list[int]]:
    """Every id's spelling in the file's alphabet, and its kind."""
    spelt = {number: (token, NORMAL) for token, number in tokenizer.definition["model"]["vocab"].items()}
    for token in tokenizer.definition["added_tokens"]:
        spelt[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    rows = [spelt.get(number, (f"[PAD{number}]", UNUSED)) for number in range(vocab_size)]
    return [token for token, _ in rows], [kind for _, kind in rows]
