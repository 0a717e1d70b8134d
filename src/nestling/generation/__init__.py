"""Logits to tokens, tokens to replies: the one engine behind chat, server, rollouts, evaluation and synthesis.

Reading order: sampling (what a request asks for), constraints, filters (pure functions on logits), sequence (what is known
about one request), strategy (the contract) and strategies/, prefixes and slots (cache rows), speculation, groups, engine
(the loop), chat (messages, tools), session, lab (methods side by side). For speed alone: packed, native and decode.cpp.
"""
