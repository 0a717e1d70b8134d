"""A tokenizer in GGUF's words: tokens, kinds, merges or scores, how text is cut, special ids and the chat template.

llama.cpp knows no regular expressions of a file; it has a list of names for the ways published models cut text. A pattern
that is not on the list can't be exported: tokens would differ silently. Of SentencePiece's models it knows BPE, without any
normalisation but the space in front.
"""

from __future__ import annotations

from typing import Any

from nestling.core.errors import UserError
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.bytelevel import split_regex
from nestling.tokenizer.folder import is_byte_level, is_characters, numbered, steps_of
from nestling.tokenizer.patterns import split_pattern
from nestling.tokenizer.sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED

_LOWEST = -1e9  # of pieces that no merge makes


def write_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Everything about the tokenizer, into a `gguf.GGUFWriter`.

    Args:
        vocab_size: ids of the model; those that the tokenizer doesn't use are filled.

    Raises:
        UserError: llama.cpp doesn't know how this tokenizer cuts or normalises text, or it is a unigram model.
    """
    if is_byte_level(tokenizer.definition) or is_characters(tokenizer.definition):
        _write_byte_level(writer, tokenizer)
    else:
        _write_sentencepiece(writer, tokenizer, vocab_size)
    tokens, kinds = _tokens(tokenizer, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_add_bos_token(tokenizer.adds_start)
    begin = tokenizer.roles.get("bos_token_id", tokenizer.end_of_text)
    end = tokenizer.end_of_text if tokenizer.chat_template is None else tokenizer.turn_end
    writer.add_bos_token_id(begin)
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(end)
    if (pad := tokenizer.roles.get("pad_token_id")) is not None:
        writer.add_pad_token_id(pad)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _write_byte_level(writer: Any, tokenizer: Tokenizer) -> None:
    merges = tokenizer.definition["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut_name(tokenizer))
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])


def _write_sentencepiece(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """llama.cpp merges by score what tokenizer.json merges by a list; it puts the space after every control token too."""
    definition = tokenizer.definition
    normal = [step for step in steps_of(definition.get("normalizer"), "normalizers") if step["type"] != "Prepend"]
    spaces = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    cuts = steps_of(definition.get("pre_tokenizer"), "pretokenizers")
    if definition["model"]["type"] != "BPE" or normal not in ([], spaces) or any(map(_splits, cuts)):
        _refuse("SentencePiece models of this kind", "serve this model with nestling, or with vLLM")
    schemes = [step.get("prepend_scheme", "always") for step in cuts if step["type"] == "Metaspace"]
    prefix = tokenizer.strips_first and not (schemes == ["first"] and tokenizer.chat_template)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(_scores(definition["model"], vocab_size))
    writer.add_add_space_prefix(prefix)
    if (unknown := numbered(definition["model"]).get(definition["model"].get("unk_token") or "")) is not None:
        writer.add_unk_token_id(unknown)


def _splits(step: Any) -> bool:
    """Whether a step of the pre-tokenizer cuts text, which llama.cpp doesn't; Gemma's cuts none, its spaces being gone."""
    pattern = step.get("pattern", {}).get("String")
    return step.get("split", True) if step["type"] == "Metaspace" else (step["type"], pattern) != ("Split", " ")


def _scores(model: Any, vocab_size: int) -> list[float]:
    """Of every id: the sooner a piece is merged, the higher.

    Raises:
        UserError: the list of merges lacks a pair that makes a token, so that merging by score would give other ids.
    """
    ids, scores = numbered(model), [_LOWEST] * vocab_size
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    for rank, pair in reversed(list(enumerate(pairs))):
        scores[ids["".join(pair)]] = float(-rank)
    known = set(pairs)
    for piece in {"".join(pair) for pair in pairs}:
        cuts = ((piece[:place], piece[place:]) for place in range(1, len(piece)))
        if any(left in ids and right in ids and (left, right) not in known for left, right in cuts):
            _refuse(f"the merges of this tokenizer, for instance to {piece!r}", "serve it with nestling, or with vLLM")
    return scores


def _refuse(what: str, fix: str) -> None:
    raise UserError(f"llama.cpp has no form for {what}", where="gguf", fix=fix)


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
    model = tokenizer.definition["model"]
    fallback = not is_byte_level(tokenizer.definition) and model.get("byte_fallback")
    spelt = {number: (token, NORMAL) for token, number in numbered(model).items()}
    if fallback:
        spelt |= {n: (token, BYTE) for n, (token, _) in spelt.items() if len(token) == 6 and token.startswith("<0x")}
    for token in tokenizer.definition["added_tokens"]:
        spelt[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    if (unknown := model.get("unk_token")) in numbered(model):
        spelt[numbered(model)[unknown]] = unknown, UNKNOWN
    rows = [spelt.get(number, (f"[PAD{number}]", UNUSED)) for number in range(vocab_size)]
    return [token for token, _ in rows], [kind for _, kind in rows]
