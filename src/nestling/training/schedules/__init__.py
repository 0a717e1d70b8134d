"""Learning-rate schedules: each file offers a pure `multiplier(step, settings) -> float` in [0, 1], steps from 1."""
