"""Measuring what a model can do: capabilities by task, and which of two models is preferred on the same prompts."""
