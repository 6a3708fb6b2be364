"""Observers: what watches activations and weights, and decides which range of them a grid has to
cover.
"""

from calib.observers.forward import input_limits, observe_inputs
from calib.observers.observer import Observer, ObserverFactory
from calib.observers.registry import OBSERVERS, observer_named

__all__ = [
    "OBSERVERS",
    "Observer",
    "ObserverFactory",
    "input_limits",
    "observe_inputs",
    "observer_named",
]
