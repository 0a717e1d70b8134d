"""Batches to logits: one decoder made of small parts. One device; no ranks, no objectives, no text."""
