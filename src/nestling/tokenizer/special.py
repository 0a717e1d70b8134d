"""The control tokens of Nestling. Text can never produce one; only code places them."""

from __future__ import annotations

END_OF_TEXT = "<|endoftext|>"
"""Stands after every pre-training document; the one control token of a base model."""

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CALL_START = "<tool_call>"
CALL_END = "</tool_call>"
THINK_START = "<think>"
THINK_END = "</think>"
PAD = "<|pad|>"

CHAT = (TURN_START, TURN_END, CALL_START, CALL_END, THINK_START, THINK_END, PAD)
"""Appended to the vocabulary when a base model becomes a chat model (ChatML, with Qwen's words for calls)."""

SHOWN = frozenset((CALL_START, CALL_END, THINK_START, THINK_END))
"""Control tokens that other servers keep in their decoded text, because their parsers look for these words."""
