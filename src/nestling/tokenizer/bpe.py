"""The tokenizer: one value that trains, loads, saves, encodes and decodes.

Its single source of truth is the content of Hugging Face's tokenizer.json, so what is saved is what was used.
Text can never become a control token: text and control tokens go through different code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nestling.core.errors import UserError
from nestling.tokenizer import folder as hub_folder
from nestling.tokenizer.bytelevel import ByteLevel, Characters, byte_symbols, check_text
from nestling.tokenizer.folder import Companions
from nestling.tokenizer.patterns import Pattern, split_pattern
from nestling.tokenizer.pieces import Pieces
from nestling.tokenizer.sandbox import ChatTemplate
from nestling.tokenizer.sentencepiece import read_sentencepiece
from nestling.tokenizer.special import END_OF_TEXT, PAD, SHOWN, TURN_END, TURN_START
from nestling.tokenizer.template import own_template

_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>")  # ours and GPT-2's and Qwen's; Llama 3's; older families'


@dataclass(frozen=True)
class TokenPiece:
    """One token as a picture of a text shows it.

    >>> TokenPiece(id=257, text=" a", bytes=b" a", control=False).text
    ' a'
    """

    id: int
    text: str
    """Readable text; bytes that are not whole characters appear as \\xNN."""
    bytes: bytes
    control: bool


class Tokenizer:
    """Text to ids and back. Immutable: `with_special` gives a new one.

    Args:
        definition: the content of a tokenizer.json, BPE or Unigram.
        where: named in error messages.
        companions: what the files beside it say, for a tokenizer that was made elsewhere.

    Raises:
        UserError: the definition is of another family.

    >>> tokenizer = Tokenizer.train(["a rose is a rose"], vocab_size=260)
    >>> tokenizer.decode(tokenizer.encode("a rose ☃"))
    'a rose ☃'
    """

    def __init__(
        self, definition: Mapping[str, Any], where: str | Path = "tokenizer.json", companions: Companions | None = None
    ) -> None:
        self.companions = companions or Companions()
        self.definition = hub_folder.check_definition(definition, where)
        self.special: dict[str, int] = hub_folder.control_tokens(self.definition, self.companions.template)
        self._codec = _codec(self.definition, self.special, where)
        numbers = [*self._codec.token_bytes, *self.special.values()]
        self.vocab_size: int = max(numbers) + 1
        self._control = {number: name for name, number in self.special.items()}
        self._bytes = [self._codec.token_bytes.get(number, b"") for number in range(self.vocab_size)]

    # ---- making one ----

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, pattern: Pattern = "gpt4", digits: int = 1) -> Tokenizer:
        """Learn byte-level BPE merges.

        Args:
            texts: training texts; read once.
            vocab_size: tokens in all: 256 bytes, END_OF_TEXT and vocab_size − 257 merges (fewer on a tiny text).
            pattern: "gpt4" or "gpt2", see `patterns.split_pattern`.
            digits: longest run of digits in one token (1 to 3); the default 1 lets tiny models copy numbers.

        Raises:
            UserError: a vocabulary below 256 + 1, or text with a lone surrogate.
        """
        if vocab_size < 257:
            raise UserError(
                "vocabulary is smaller than 256 bytes + 1 special token",
                where="tokenizer.vocab_size", value=vocab_size, fix="use at least 257",
            )  # fmt: skip
        core = tokenizers.Tokenizer(models.BPE())
        cut = pre_tokenizers.Split(tokenizers.Regex(split_pattern(pattern, digits)), "isolated")
        spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.pre_tokenizer = pre_tokenizers.Sequence([cut, spelled])
        core.decoder = decoders.ByteLevel()
        alphabet = list(byte_symbols().values())
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
        core.train_from_iterator(_checked(texts), trainer)
        return cls(json.loads(core.to_str())).with_special([END_OF_TEXT])

    @classmethod
    def characters(cls, texts: Iterable[str], *, byte_fallback: bool = True) -> Tokenizer:
        """A character-level tokenizer: one token per character of `texts`, in code point order.

        Args:
            byte_fallback: write a character never seen as its UTF-8 bytes (256 more tokens), so that any text
                round-trips; without it such a character is a UserError.
        """
        seen: set[str] = set()
        for text in _checked(texts):
            seen.update(text)
        return cls(hub_folder.character_definition(sorted(seen), byte_fallback)).with_special([END_OF_TEXT])

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder, ours or a local Hugging Face folder.

        That is tokenizer.json, or SentencePiece's tokenizer.model where there is none; and the files beside it.

        Raises:
            UserError: no such file, a broken one, or a tokenizer of another family.
        """
        folder = Path(folder)
        model = folder / "tokenizer.model"
        only_model = model.is_file() and not (folder / "tokenizer.json").is_file()
        definition = read_sentencepiece(model) if only_model else hub_folder.read_definition(folder)
        definition = hub_folder.check_definition(definition, folder)
        companions = hub_folder.read_companions(folder)
        return cls(hub_folder.with_named(definition, companions), folder, companions)

    @classmethod
    def from_gpt2(cls, vocab_json: str | Path, merges_txt: str | Path) -> Tokenizer:
        """GPT-2's two files: `vocab.json` and `merges.txt`.

        >>> Tokenizer.from_gpt2("gpt2/vocab.json", "gpt2/merges.txt").encode("Write a")   # doctest: +SKIP
        [16594, 257]
        """
        return cls(hub_folder.gpt2_definition(Path(vocab_json), Path(merges_txt)), where=vocab_json)

    def with_special(self, names: Sequence[str]) -> Tokenizer:
        """The same tokenizer with control tokens appended after all present ids; names it already has are kept."""
        missing = [name for name in dict.fromkeys(names) if name not in self.special]
        added = [
            hub_folder.added_token(self.vocab_size + place, name, hidden=name not in SHOWN)
            for place, name in enumerate(missing)
        ]
        definition = {**self.definition, "added_tokens": [*self.definition["added_tokens"], *added]}
        return Tokenizer(definition, companions=self.companions)

    def save(self, folder: str | Path, *, context: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json (with the chat template once chat tokens are present).

        Args:
            context: the model's context length in tokens, stored as `model_max_length`.
        """
        named = {
            "eos": TURN_END if self.chat_template == own_template() else self.companions.name("eos") or self._name(self._end),
            "pad": self.companions.name("pad") if self.companions.template else self._name(self.special.get(PAD, self._end)),
        }
        config = {
            **self.companions.config,
            "tokenizer_class": "PreTrainedTokenizerFast",  # the one that reads tokenizer.json as it stands
            "clean_up_tokenization_spaces": False,
            **{f"{role}_token": name for role, name in named.items() if name is not None},
        }
        if context:
            config["model_max_length"] = context
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        hub_folder.write(Path(folder), self.definition, config)

    # ---- text to ids ----

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Words that spell a control token stay text.

        Raises:
            UserError: a lone surrogate, or a character that a character vocabulary lacks.
        """
        check_text(text)
        return self._codec.encode(text)

    def encode_within(self, text: str) -> list[int]:
        """Ids of a text that goes on after a control token; SentencePiece's models put no space before it.

        Raises:
            UserError: as `encode`.
        """
        check_text(text)
        return self._codec.encode_within(text)

    def spans(self, text: str, within: bool = False) -> list[tuple[int, int]]:
        """Which characters of a text each of its ids stands for, as (start, end); `within` as for `encode_within`."""
        return self._codec.spans(text, within)

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts as uint32 arrays: the way for bulk text, on all cores of this process."""
        for text in texts:
            check_text(text)
        return self._codec.encode_arrays(texts)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts as lists."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    # ---- ids to text ----

    def decode_bytes(self, ids: Iterable[int], *, control: bool = False) -> bytes:
        """The bytes that ids stand for. Control tokens are left out, or spelled when `control` is true."""
        if not control:
            return b"".join([self._bytes[number] for number in ids])
        return b"".join(self._control.get(number, "").encode() or self._bytes[number] for number in ids)

    def decode(self, ids: Iterable[int], *, control: bool = False, begins: bool = True) -> str:
        """The text that ids stand for; bytes that are not UTF-8 become U+FFFD.

        Args:
            control: spell control tokens instead of leaving them out.
            begins: the ids begin a text, so that the space which SentencePiece's models put before one is left out.
        """
        text = self.decode_bytes(ids, control=control).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if begins and self.strips_first else text

    def view(self, text: str | Sequence[int]) -> list[TokenPiece]:
        """Every token of a text (or of ids) with its id and what it stands for."""
        return [self._piece(number) for number in (self.encode(text) if isinstance(text, str) else text)]

    def _piece(self, number: int) -> TokenPiece:
        if number in self._control:
            return TokenPiece(number, self._control[number], b"", True)
        return TokenPiece(number, self._bytes[number].decode(errors="backslashreplace"), self._bytes[number], False)

    # ---- facts ----

    def id(self, name: str) -> int:
        """The id of a control token.

        Raises:
            UserError: this tokenizer has no such control token.
        """
        if name not in self.special:
            known = ", ".join(self.special) or "none"
            raise UserError(
                "the tokenizer lacks this control token", value=name, fix=f"it has {known}; chat tokens come with sft"
            )
        return self.special[name]

    @property
    def strips_first(self) -> bool:
        """True when the space at the beginning of a decoded text is not part of it."""
        return self._codec.strips_first

    @property
    def end_of_text(self) -> int:
        """The id that stands after each document (<|endoftext|>, or what the loaded family calls it)."""
        return self.id(END_OF_TEXT) if self._end is None else self._end

    @property
    def start_of_text(self) -> int:
        """The id that stands before a text: the family's own, such as Llama's <s>, or what ends the document before."""
        return self._role("bos") if self.adds_start else self.end_of_text  # type: ignore[return-value]

    @property
    def adds_start(self) -> bool:
        """Whether the family puts a token of its own before every text."""
        steps = hub_folder.steps_of(self.definition.get("post_processor"), "processors")
        puts = any("SpecialToken" in (step.get("single") or [{}])[0] for step in steps)
        return self._role("bos") is not None and bool(self.companions.config.get("add_bos_token", puts))

    @property
    def filler(self) -> int:
        """The id that fills up batches: padding's own, or what ends a document.

        Raises:
            UserError: there is neither.
        """
        found = self.special.get(PAD, self._role("pad"))
        return self.end_of_text if found is None else found

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that says how messages are written; None for a base model's tokenizer."""
        own = own_template() if TURN_START in self.special and TURN_END in self.special else None
        return self.companions.template or own

    @property
    def has_own_form(self) -> bool:
        """Whether conversations are written as models made here write them; else by the Jinja template, `template`."""
        template = self.chat_template
        return template is None or (template == own_template() and not isinstance(self._codec, Pieces))

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template, ready to be filled in."""
        if self.chat_template is None:
            return None
        return ChatTemplate(self.chat_template, self.special, self.companions.roles)

    @property
    def takes_tools(self) -> bool:
        """Whether a conversation can say which tools are on offer."""
        return self.has_own_form or (self.template is not None and self.template.takes_tools)

    @cached_property
    def turn_end(self) -> int:
        """The id with which the assistant closes its turn: what the chat template writes there.

        Raises:
            UserError: a base model's tokenizer.
        """
        if self.template is None or self.has_own_form:
            return self.id(TURN_END)
        name = self.template.closing
        return self.end_of_text if name is None else self.special[name]

    @property
    def turn_ends(self) -> frozenset[int]:
        """The ids after which the assistant's turn is complete, tool calls included."""
        return frozenset([self.turn_end]) if self.has_own_form else self.stop_ids

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a reply or a document: by the tokenizer, generation_config.json and the chat template."""
        listed = self.companions.generation.get("eos_token_id")
        ends = {*(listed if isinstance(listed, list) else [listed]), self._role("eos"), self._end}
        ends |= {self.turn_end} if self.template is not None else set()
        return frozenset(number for number in ends if number is not None)

    @property
    def roles(self) -> dict[str, int]:
        """bos_token_id, eos_token_id and pad_token_id, as config.json names them."""
        begin = self._role("bos")
        end = self.turn_end if self.template is not None else self._end
        pad = self.special.get(PAD, self._role("pad"))
        if pad == self._end and not self.companions.template:
            pad = None  # a base model's has none of its own
        found = {"bos_token_id": self._end if begin is None else begin, "eos_token_id": end, "pad_token_id": pad}
        return {name: number for name, number in found.items() if number is not None}

    @property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json: what the model's makers wrote there, and the ids that end a reply, its own first."""
        named = self.roles
        ends = sorted(self.stop_ids, key=lambda number: (number != named.get("eos_token_id"), number))
        said = {key: value for key, value in self.companions.generation.items() if key != "_from_model_config"}
        return {**said, **named, **({"eos_token_id": ends} if ends else {})}

    def _role(self, role: str) -> int | None:
        return self.special.get(self.companions.name(role) or "")

    def _name(self, number: int | None) -> str | None:
        return None if number is None else self._control.get(number)

    @cached_property
    def _end(self) -> int | None:
        known = next((self.special[name] for name in _ENDS if name in self.special), None)
        return self._role("eos") if known is None else known

    @cached_property
    def byte_lengths(self) -> list[int]:
        """Bytes of text that each id stands for, [V]; 0 for control tokens."""
        return [len(piece) for piece in self._bytes]

    @property
    def is_fast(self) -> bool:
        """True when bulk text goes through tiktoken (its ids proven equal for this vocabulary)."""
        return self._codec.is_exactly_fast

    @cached_property
    def hash(self) -> str:
        """Identity of the whole tokenizer, control tokens included."""
        return _digest(self.definition)

    @cached_property
    def text_hash(self) -> str:
        """Identity of what plain text becomes: unchanged when control tokens are appended, so shards stay valid."""
        return _digest({key: self.definition.get(key) for key in ("model", "normalizer", "pre_tokenizer")})


def _codec(
    definition: Mapping[str, Any], control: Mapping[str, int], where: str | Path
) -> ByteLevel | Characters | Pieces:
    if hub_folder.is_characters(definition):
        return Characters(definition)
    return (ByteLevel if hub_folder.is_byte_level(definition) else Pieces)(definition, control, where)


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _checked(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        check_text(text)
        yield text
