"""Text to ids and back: byte-level BPE, control tokens, the conversation renderer, the token view."""
