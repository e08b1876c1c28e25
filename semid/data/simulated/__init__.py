"""The simulated catalogue: a world whose true next-item distribution is known."""

from semid.data.simulated.config import EVENTS, Events, SimulatedConfig
from semid.data.simulated.oracle import Oracle
from semid.data.simulated.world import simulate

__all__ = [
    "EVENTS",
    "Events",
    "Oracle",
    "SimulatedConfig",
    "simulate",
]
