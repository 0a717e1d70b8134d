"""Ids to batches: shards on disk, packing, and loaders for text, chats, preferences and prompts.

Every loader's `batch(step)` is a pure function of its seed and the step, so resuming is asking for the next step.
"""
