"""What keeps a long run alive: bad steps are passed over, and a run that is told to stop can be continued."""

from vil_lightning.reliability.peers import lost_peer, watch_launcher
from vil_lightning.reliability.preemption import Preempted, Preemption
from vil_lightning.reliability.step_guard import DivergedError, FaultPolicy, StepGuard

__all__ = ["DivergedError", "FaultPolicy", "Preempted", "Preemption", "StepGuard", "lost_peer", "watch_launcher"]
