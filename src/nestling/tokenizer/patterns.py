"""How text is cut before any merge: BPE never joins across these pieces.

The patterns are written exactly as the published models store them, so that other runtimes recognise them.
"""

from __future__ import annotations

from typing import Literal

from nestling.core.errors import UserError

Pattern = Literal["gpt4", "gpt2"]

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split_pattern(pattern: Pattern = "gpt4", digits: int = 1) -> str:
    """The regular expression that cuts text into pieces.

    Args:
        pattern: "gpt4" (contractions in any case, line ends apart, digits grouped) or "gpt2" (digits: as many as come).
        digits: the longest run of digits in one piece, 1 to 3. The default 1 gives every digit its own token, as Qwen
            and Llama 2 do: a tiny model can then copy and align numbers digit by digit, at the price of longer
            sequences. 3 is what GPT-4 and Llama 3 do.

    Raises:
        UserError: another pattern name, or digits outside 1 to 3.

    >>> split_pattern("gpt2").startswith("'")
    True
    """
    if pattern == "gpt2":
        return GPT2
    if pattern != "gpt4":
        raise UserError("unknown split pattern", where="tokenizer.pattern", value=pattern, fix="use gpt4 or gpt2")
    if digits not in (1, 2, 3):
        raise UserError("digits per piece out of range", where="tokenizer.digits", value=digits, fix="use 1, 2 or 3")
    numbers = r"\p{N}" if digits == 1 else rf"\p{{N}}{{1,{digits}}}"
    return "|".join((_CONTRACTIONS, _WORDS, numbers, _REST))
