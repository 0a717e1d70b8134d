"""Text on its way to becoming better text: sources, splits, mixture. A new source is one new file in `sources/`."""
