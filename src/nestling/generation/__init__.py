"""Logits to tokens, tokens to replies: the one engine behind chat, server, rollouts, evaluation and synthesis.

Reading order: sampling (what a request asks for), filters (pure functions on logits), sequence (what is known about one
request), strategy (the contract) and strategies/, slots (cache rows), engine (the loop), chat (messages, tools), session.
"""
