"""The one training loop: it asks an objective for updates, sums their terms, and knows no model and no algorithm."""
