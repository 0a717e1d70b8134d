"""OpenAI's request and response shapes, and their translation to and from messages, sampling parameters and pieces.

Nothing here waits, computes or knows of HTTP.
"""
