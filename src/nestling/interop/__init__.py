"""Side room: the formats of other programs, in and out, and the proof that a model answers there as it does here."""
