"""Optimisers: each file offers `build(groups, settings, runtime) -> list[torch.optim.Optimizer]`, named by its file."""
