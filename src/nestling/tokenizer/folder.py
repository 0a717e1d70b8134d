"""tokenizer.json and the files beside it: reading, checking, writing. Knows the files, not the encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nestling.core.errors import UserError
from nestling.core.storage import read_json, write_json
from nestling.tokenizer.template import current

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def added_token(number: int, content: str, hidden: bool) -> dict[str, Any]:
    """An entry of `added_tokens`; hidden ones vanish from text that other libraries decode for people."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **plain, "special": hidden}


def check_definition(definition: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """The definition as a dict, if this package can encode with it.

    Raises:
        UserError: neither BPE nor Unigram, or no tokenizer.json at all.
    """
    model = definition.get("model") if isinstance(definition, Mapping) else None
    kind = model.get("type") if isinstance(model, Mapping) else None
    if model is None or kind not in ("BPE", "Unigram") or "vocab" not in model:
        raise UserError("only BPE and Unigram tokenizers are supported", where=where, value=kind)
    return {**definition, "added_tokens": definition.get("added_tokens") or []}


def is_byte_level(definition: Mapping[str, Any]) -> bool:
    """True where tokens are spelled in GPT-2's symbols for bytes."""
    return any(step["type"] == "ByteLevel" for step in steps_of(definition.get("pre_tokenizer"), "pretokenizers"))


def steps_of(step: Mapping[str, Any] | None, parts: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder; `parts` is where a sequence of that sort keeps them."""
    return list((step or {}).get(parts, [step] if step else []))


def is_characters(definition: Mapping[str, Any]) -> bool:
    """True for what `character_definition` makes: no merges, nothing cut, every token one character or one byte."""
    is_bare = definition.get("pre_tokenizer") is None and definition.get("normalizer") is None
    return is_bare and definition["model"].get("merges") == []


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
    model = {"type": "BPE", **empty, **flags, "vocab": vocabulary, "merges": merges}
    return definition_of(model, pre_tokenizer=cut, decoder=decoder)


def definition_of(model: Mapping[str, Any], **parts: Any) -> dict[str, Any]:
    """A tokenizer.json around a model; parts that are not given do nothing."""
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {"version": "1.0", **nothing, "added_tokens": [], "pre_tokenizer": None, "decoder": None, **parts, "model": model}


def read_definition(folder: Path) -> dict[str, Any]:
    """The content of `folder/tokenizer.json`.

    Raises:
        UserError: there is none.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError("no tokenizer.json here", where=folder, fix="give a checkpoint or tokenizer folder")
    return read_json(path)


@dataclass(frozen=True)
class Companions:
    """What the files beside tokenizer.json say; empty for a tokenizer that was made here."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """tokenizer_config.json."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """generation_config.json."""
    template: str | None = None
    """How the model's makers write a conversation, in Jinja."""

    def name(self, role: str) -> str | None:
        """The token of a role: "bos", "eos", "pad", …"""
        found = self.config.get(f"{role}_token")
        return found.get("content") if isinstance(found, Mapping) else found

    @property
    def roles(self) -> dict[str, str]:
        """What a template knows of the tokens: {"bos_token": "<s>", …}."""
        return {f"{role}_token": name for role in _ROLES if (name := self.name(role)) is not None}


def read_companions(folder: Path) -> Companions:
    """The files beside tokenizer.json; those that are not there say nothing.

    Raises:
        UserError: broken JSON.
    """
    config = {**_read_object(folder / "special_tokens_map.json"), **_read_object(folder / "tokenizer_config.json")}
    found = _read_object(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(found, list):  # several by name
        found = next((one.get("template") for one in found if one.get("name") == "default"), None)
    path = folder / "chat_template.jinja"
    template = path.read_text(encoding="utf-8") if path.is_file() else found
    return Companions(config, _read_object(folder / "generation_config.json"), current(template))


def _read_object(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise UserError("is no JSON object", where=path, fix="copy the file again")
    return found


def with_named(definition: Mapping[str, Any], companions: Companions) -> dict[str, Any]:
    """The definition with the tokens that only tokenizer_config.json names, as transformers adds them."""
    added = {token["content"]: token for token in definition["added_tokens"]}
    numbers = numbered(definition["model"])
    listed = companions.config.get("added_tokens_decoder") or {}
    extra = {entry["content"]: added_token(int(n), entry["content"], True) | entry for n, entry in listed.items()}
    size = 1 + max([*numbers.values(), *(token["id"] for token in (*added.values(), *extra.values()))], default=-1)
    for name in companions.roles.values():
        found = added.get(name) or extra.get(name) or added_token(numbers.get(name, size), name, True)
        size += found["id"] == size
        extra[name] = found | {"special": True}
    named = {name: token for name, token in extra.items() if name not in added or name in companions.roles.values()}
    return {**definition, "added_tokens": sorted({**added, **named}.values(), key=lambda token: token["id"])}


def numbered(model: Mapping[str, Any]) -> dict[str, int]:
    """token -> id of a model, whose vocabulary is a table (BPE) or a list with scores (Unigram)."""
    vocabulary = model["vocab"]
    return vocabulary if isinstance(vocabulary, dict) else {row[0]: number for number, row in enumerate(vocabulary)}


def control_tokens(definition: Mapping[str, Any], template: str | None) -> dict[str, int]:
    """The added tokens that no text may become: name -> id.

    An added token that is no `special` one, but blank space or part of the model's vocabulary, such as Gemma's runs of line
    ends, is text like any other, unless the chat template speaks it.
    """
    vocabulary = numbered(definition["model"])
    return {
        name: token["id"]
        for token in definition["added_tokens"]
        if (name := token["content"]) and not _is_text(token, vocabulary, template or "")
    }


def _is_text(token: Mapping[str, Any], vocabulary: Mapping[str, int], template: str) -> bool:
    name = token["content"]
    return not token["special"] and (name.isspace() or (name in vocabulary and name not in template))


def write(folder: Path, definition: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    write_json(folder / "tokenizer.json", definition)
    write_json(folder / "tokenizer_config.json", config)
