"""The tokenizers that lie beside other programs' checkpoints, as one of ours.

nanoGPT's meta.pkl is a pickle: its instructions are read as data (`pickletools`), and any but those that hold texts,
numbers and dicts is refused, so nothing in it is ever executed. llama2.c's tokenizer.bin holds SentencePiece's pieces
in another form.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Iterator
from pathlib import Path

from nestling.core.errors import UserError
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.folder import Companions, character_definition, with_named
from nestling.tokenizer.sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, Model, read_sentencepiece

PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
META, BINARY, PIECES, OURS = "meta.pkl", "tokenizer.bin", "tokenizer.model", "tokenizer.json"
KNOWN = f"{OURS}, {PIECES}, {BINARY}, vocab.json with merges.txt, encoder.json with vocab.bpe, {META}"
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
_HOLD_DATA = ("PROTO", "FRAME", "MARK", "STOP", "EMPTY_DICT", "SETITEM", "SETITEMS", "MEMOIZE", "BINPUT", "LONG_BINPUT",
              "BINGET", "LONG_BINGET", "BININT", "BININT1", "BININT2", "BINUNICODE", "SHORT_BINUNICODE")  # fmt: skip


def find_tokenizer(place: Path) -> Tokenizer:
    """The tokenizer in a folder, or that a file of it names.

    Raises:
        UserError: none there, a damaged one, or a pickle of something else.
    """
    folder = place if place.is_dir() else place.parent
    here = {file.name for file in folder.glob("*")} if place.is_dir() else {place.name}
    if OURS in here:
        return Tokenizer.load(folder)
    if place.is_file() and place.suffix in (".model", ".bin"):
        return _pieces(place)
    for name in (PIECES, BINARY):
        if name in here:
            return _pieces(folder / name)
    for vocabulary, merges in PAIRS:
        if {vocabulary, merges} & here:
            return Tokenizer.from_gpt2(folder / vocabulary, folder / merges)
    if META in here:
        characters = list(_characters(folder / META))
        return Tokenizer(character_definition(characters, byte_fallback=False), where=folder / META)
    raise UserError(
        "no tokenizer is here", where=place, fix=f"name its file or folder with --tokenizer; known are {KNOWN}"
    )


def _pieces(file: Path) -> Tokenizer:
    """SentencePiece's model, or llama2.c's copy of it, with the ids that Llama gives to the ends of a text."""
    llama = Companions(_LLAMA)
    definition = Model(list(_binary_pieces(file))).definition() if file.suffix == ".bin" else read_sentencepiece(file)
    return Tokenizer(with_named(definition, llama), file, llama)


def _binary_pieces(file: Path) -> Iterator[tuple[str, float, int]]:
    """(text, score, kind) of each token of llama2.c's, which knows the kinds by the ids.

    Blanks stay as they are, as in Llama's and in run.c, whatever the model that the file was made of did with them.
    """
    data, place, number = file.read_bytes(), 4, 0  # the first number is the length of the longest
    try:
        while place < len(data):
            score, length = struct.unpack_from("<fI", data, place)
            [raw] = struct.unpack_from(f"{length}s", data, place + 8)
            text, kind = raw.decode().replace(" ", SPACE), NORMAL
            if number < 3:
                text, kind = ("<unk>", "<s>", "</s>")[number], CONTROL if number else UNKNOWN
            elif number < 3 + 256:
                text, kind = f"<0x{number - 3:02X}>", BYTE
            yield text, score, kind
            place, number = place + 8 + length, number + 1
    except (struct.error, UnicodeDecodeError):
        raise UserError("this is no tokenizer of llama2.c", where=file, fix="copy the file again") from None


def _characters(file: Path) -> Iterator[str]:
    """nanoGPT's characters in the order of their ids: `itos` maps ids to them, so each follows its id in the file."""
    fix = "name the tokenizer with --tokenizer"
    table: dict[int, str] = {}
    latest: object = None
    try:
        for code, argument, _ in pickletools.genops(file.read_bytes()):
            if code.name not in _HOLD_DATA:
                raise UserError(
                    "a pickle that would do more than hold data is not read", where=file, value=code.name, fix=fix
                )
            if isinstance(argument, str) and len(argument) == 1 and isinstance(latest, int):
                table[latest] = argument
            if "INT" in code.name or "UNICODE" in code.name:
                latest = argument
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError("this is no pickle", where=file, fix=fix) from None
    if not table or sorted(table) != list(range(len(table))):
        raise UserError("holds no table of characters (itos)", where=file, fix=fix)
    return (table[number] for number in range(len(table)))
