"""The registry of decoding strategies: a file here is a value of `Sampling.strategy`.

A file offers a class `Strategy(Decoding)`; see generation/strategy.py for the contract. sample.py is the default, greedy.py
the smallest, beam.py one with several rows per request.
"""
