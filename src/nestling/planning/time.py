"""How long work takes: operations divided by what the machine gets done."""

from __future__ import annotations

from dataclasses import dataclass

TYPICAL_UTILISATION = 0.4
"""Share of a measured matrix peak that training reaches before anything of a run is known; 0.3 to 0.55 is usual."""


@dataclass(frozen=True)
class Speed:
    """What a machine gets done: `Speed(peak=312e12, utilisation=0.46, devices=1024)` is GPT-3's assumed cluster.

    `peak` is in FLOP/s of one device.
    """

    peak: float
    utilisation: float = TYPICAL_UTILISATION
    devices: int = 1

    @property
    def flops(self) -> float:
        """FLOP/s in all."""
        return self.peak * self.utilisation * self.devices

    def seconds(self, flops: float) -> float:
        """Seconds that so many operations take."""
        return flops / self.flops
