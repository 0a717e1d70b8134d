"""tokenizer.json and tokenizer_config.json: reading, checking, writing. Knows the files, not the encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestling.core.errors import UserError
from nestling.core.storage import read_json, write_json
from nestling.tokenizer.special import PAD, TURN_END, TURN_START
from nestling.tokenizer.template import CHAT_TEMPLATE

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def added_token(number: int, content: str, hidden: bool) -> dict[str, Any]:
    """An entry of `added_tokens`; hidden ones vanish from text that other libraries decode for people."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **plain, "special": hidden}


def check_definition(definition: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """The definition as a dict, if this package can encode with it.

    Raises:
        UserError: not BPE, or BPE that is neither byte-level nor characters.
    """
    kind = (definition.get("model") or {}).get("type")
    if kind != "BPE":
        raise UserError("only BPE tokenizers are supported", where=where, value=kind)
    if not is_characters(definition) and "ByteLevel" not in _step_types(definition.get("pre_tokenizer")):
        raise UserError(
            "this BPE is not byte-level (a SentencePiece model?)", where=where,
            fix="use a model of the GPT-2, Llama 3 or Qwen kind",
        )  # fmt: skip
    return dict(definition)


def _step_types(step: Mapping[str, Any] | None) -> list[str]:
    steps = (step or {}).get("pretokenizers", [step] if step else [])
    return [part["type"] for part in steps]


def is_characters(definition: Mapping[str, Any]) -> bool:
    """True for what `character_definition` makes: no merges, nothing cut, every token one character or one byte."""
    model = definition["model"]
    return not model["merges"] and definition.get("pre_tokenizer") is None


def character_definition(characters: Sequence[str], byte_fallback: bool) -> dict[str, Any]:
    """A tokenizer.json that maps each character to one id, after 256 byte tokens when there is a fallback."""
    names = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    vocabulary = {token: number for number, token in enumerate([*names, *characters])}
    steps = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    decoder = {"type": "Sequence", "decoders": steps} if byte_fallback else {"type": "Fuse"}
    return _definition(vocabulary, [], None, decoder, byte_fallback)


def gpt2_definition(vocab_json: Path, merges_txt: Path) -> dict[str, Any]:
    """The tokenizer.json that GPT-2's two files stand for."""
    vocabulary = read_json(vocab_json)
    lines = merges_txt.read_text(encoding="utf-8").splitlines()
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    definition = _definition(vocabulary, merges, _BYTE_LEVEL, _BYTE_LEVEL, False)
    ends = [name for name in vocabulary if name.startswith("<|") and name.endswith("|>")]
    return definition | {"added_tokens": [added_token(vocabulary[name], name, hidden=True) for name in ends]}


def _definition(
    vocabulary: dict[str, int], merges: list[list[str]], cut: Any, decoder: Any, byte_fallback: bool
) -> dict[str, Any]:
    empty = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    flags = {"fuse_unk": False, "byte_fallback": byte_fallback, "ignore_merges": False}
    return {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "added_tokens": [],
        "pre_tokenizer": cut,
        "decoder": decoder,
        "model": {"type": "BPE", **empty, **flags, "vocab": vocabulary, "merges": merges},
    }


def read_definition(folder: Path) -> dict[str, Any]:
    """The content of `folder/tokenizer.json`.

    Raises:
        UserError: there is none.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError("no tokenizer.json here", where=folder, fix="give a checkpoint or tokenizer folder")
    return read_json(path)


def write(
    folder: Path, definition: Mapping[str, Any], special: Mapping[str, int], end: str | None, context: int | None
) -> None:
    """Write both files. A tokenizer with chat tokens ends its turns with <|im_end|> and carries the chat template."""
    chat = TURN_START in special and TURN_END in special
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END if chat else end,
        "pad_token": PAD if PAD in special else end,
    }
    if context:
        config["model_max_length"] = context
    if chat:
        config["chat_template"] = CHAT_TEMPLATE
    write_json(folder / "tokenizer.json", definition)
    write_json(folder / "tokenizer_config.json", config)
