"""What a model and a run will take, before anything runs: weights, operations, memory, time."""
