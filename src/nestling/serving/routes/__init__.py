"""One router per file: what the service answers, and where."""
