"""How long work takes, and what it costs: operations divided by what the machine gets done."""

from __future__ import annotations

from dataclasses import dataclass

TYPICAL_UTILISATION = 0.4
"""Share of a measured matrix peak that training reaches before anything of a run is known; 0.3 to 0.55 is usual."""


@dataclass(frozen=True)
class Speed:
    """What a machine gets done: `Speed(peak=312e12, utilisation=0.46, devices=1024)` is GPT-3's assumed cluster.

    `peak` is in FLOP/s of one device; `measured` says that the share is one that a run was seen to reach.
    """

    peak: float
    utilisation: float = TYPICAL_UTILISATION
    devices: int = 1
    measured: bool = False

    @property
    def flops(self) -> float:
        """FLOP/s in all."""
        return self.peak * self.utilisation * self.devices

    def seconds(self, flops: float) -> float:
        """Seconds that so many operations take."""
        return flops / self.flops


@dataclass(frozen=True)
class Prices:
    """What a training run is paid with; every figure is the reader's own.

    >>> Prices(device=2.0).of(device_hours=100)
    200.0
    """

    device: float = 0.0
    """Of one device's hour: rent, or its price over its life, with server, network and building."""
    kilowatts: float = 0.0
    """That one device draws, with what cools and feeds it."""
    energy: float = 0.0
    """Of a kilowatt-hour."""
    staff: float = 0.0
    """Of the people, for the whole run."""

    def of(self, device_hours: float) -> float:
        """The run's cost, in the currency of the prices."""
        return device_hours * (self.device + self.kilowatts * self.energy) + self.staff
