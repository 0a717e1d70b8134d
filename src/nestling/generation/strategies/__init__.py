"""The registry of decoding strategies: a file here is a value of `Sampling.strategy`, with a class `Strategy(Decoding)`."""
