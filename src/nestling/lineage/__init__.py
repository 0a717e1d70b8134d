"""The older models that led to the transformer, on the same text and in the same unit: bits per byte."""
