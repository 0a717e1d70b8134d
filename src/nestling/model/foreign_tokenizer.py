"""The tokenizers that lie beside other programs' checkpoints, as one of ours.

nanoGPT's meta.pkl is a pickle: its instructions are read as data (`pickletools`), and any but those that hold texts,
numbers and dicts is refused, so nothing in it is ever executed. llama2.c's tokenizer.bin holds SentencePiece's pieces
in another form, and is brought back to that.
"""

from __future__ import annotations

import pickletools
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nestling.core.errors import UserError
from nestling.core.storage import write_json
from nestling.tokenizer.bpe import Tokenizer
from nestling.tokenizer.folder import character_definition

PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
META, BINARY, PIECES, OURS = "meta.pkl", "tokenizer.bin", "tokenizer.model", "tokenizer.json"
KNOWN = f"{OURS}, {PIECES}, {BINARY}, vocab.json with merges.txt, encoder.json with vocab.bpe, {META}"
_BPE, _NORMAL, _UNKNOWN, _CONTROL, _BYTE = 2, 1, 2, 3, 6
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
_HOLD_DATA = ("PROTO", "FRAME", "MARK", "STOP", "EMPTY_DICT", "SETITEM", "SETITEMS", "MEMOIZE", "BINPUT", "LONG_BINPUT",
              "BINGET", "LONG_BINGET", "BININT", "BININT1", "BININT2", "BINUNICODE", "SHORT_BINUNICODE")  # fmt: skip


def find_tokenizer(place: Path) -> Tokenizer:
    """The tokenizer in a folder, or that a file of it names.

    Raises:
        UserError: none there, a damaged one, or a pickle of something else.
    """
    folder, names = (place, KNOWN) if place.is_dir() else (place.parent, place.name)
    here = {file.name for file in folder.glob("*") if file.name in names}
    if OURS in here:
        return Tokenizer.load(folder)
    if PIECES in here:
        return _pieces(folder / PIECES)
    if BINARY in here:
        return _pieces(folder / BINARY)
    for vocabulary, merges in PAIRS:
        if {vocabulary, merges} & here:
            return Tokenizer.from_gpt2(folder / vocabulary, folder / merges)
    if META in here:
        characters = list(_characters(folder / META))
        return Tokenizer(character_definition(characters, byte_fallback=False), where=folder / META)
    raise UserError("no tokenizer is here", where=place, fix=f"name its file or folder with --tokenizer; known are {KNOWN}")


def _pieces(file: Path) -> Tokenizer:
    """SentencePiece's model, or llama2.c's copy of it, with the ids that Llama gives to the ends of a text."""
    with tempfile.TemporaryDirectory() as workplace:
        folder = Path(workplace)
        if file.name == BINARY:
            (folder / PIECES).write_bytes(_model_file(file))
        else:
            shutil.copy(file, folder / PIECES)
        write_json(folder / "tokenizer_config.json", _LLAMA)
        return Tokenizer.load(folder)


def _model_file(file: Path) -> bytes:
    """llama2.c's tokenizer as SentencePiece writes it (sentencepiece_model.proto): BPE, bytes, a space put first.

    Blanks stay as they are, as in Llama's and in run.c, whatever the model that the file was made of did with them.
    """
    out = b""
    for number, (text, score) in enumerate(_binary_pieces(file)):
        kind = _NORMAL
        if number < 3:
            text, kind = ("<unk>", "<s>", "</s>")[number], _CONTROL if number else _UNKNOWN
        elif number < 3 + 256:
            text, kind = f"<0x{number - 3:02X}>", _BYTE
        out += _field(1, _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind))
    return out + _field(2, _number(3, _BPE) + _number(35, 1) + _number(40, 0)) + _field(3, _number(3, 1) + _number(4, 0))


def _binary_pieces(file: Path) -> Iterator[tuple[str, float]]:
    """(text, score) of each token."""
    data, place = file.read_bytes(), 4  # the first number is the length of the longest
    try:
        while place < len(data):
            score, length = struct.unpack_from("<fI", data, place)
            [raw] = struct.unpack_from(f"{length}s", data, place + 8)
            place += 8 + length
            yield raw.decode().replace(" ", "▁"), score
    except (struct.error, UnicodeDecodeError):
        raise UserError("this is no tokenizer of llama2.c", where=file, fix="copy the file again") from None


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _characters(file: Path) -> Iterator[str]:
    """nanoGPT's characters in the order of their ids: `itos` maps ids to them, so each follows its id in the file."""
    fix = "name the tokenizer with --tokenizer"
    table: dict[int, str] = {}
    latest: object = None
    try:
        for code, argument, _ in pickletools.genops(file.read_bytes()):
            if code.name not in _HOLD_DATA:
                raise UserError("a pickle that would do more than hold data is not read", where=file, value=code.name, fix=fix)
            if isinstance(argument, str) and len(argument) == 1 and isinstance(latest, int):
                table[latest] = argument
            if "INT" in code.name or "UNICODE" in code.name:
                latest = argument
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError("this is no pickle", where=file, fix=fix) from None
    if not table or sorted(table) != list(range(len(table))):
        raise UserError("holds no table of characters (itos)", where=file, fix=fix)
    return (table[number] for number in range(len(table)))
