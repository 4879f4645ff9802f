"""Encounters of two aircraft in a plane, and what each manoeuvre costs there: the table that a network learns.

A state is five numbers between -0.5 and 0.5: distance (0 to 10 km), bearing of the intruder and its heading, both
relative to the own heading (a full turn each), own speed (60 to 260 m/s) and intruder speed (0 to 260 m/s). The own
aircraft turns at a constant rate, the intruder flies on. A manoeuvre costs what the closest approach is worth, a near
one more than a far one and an early one more than a late one, and the price of turning.
"""

from __future__ import annotations

import numpy as np

ADVISORIES = ("clear of conflict", "weak left", "weak right", "strong left", "strong right")
LOW, HIGH = [-0.5] * 5, [0.5] * 5

_RANGE = 10_000.0
_OWN_SPEED, _INTRUDER_SPEED = (60.0, 260.0), (0.0, 260.0)
_TURN_RATES = np.deg2rad([0.0, 2.0, -2.0, 4.0, -4.0])
_PRICES = (0.0, 0.03, 0.03, 0.06, 0.06)
# Seconds looked ahead; from about the middle on an approach counts for little.
_HORIZON, _COUNTS_UNTIL, _FADING = 36, 20.0, 3.0
_NEAR = 900.0
_CHUNK = 20_000


def draw(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return states drawn evenly, [count, 5] float32."""
    return rng.uniform(LOW, HIGH, (count, 5)).astype(np.float32)


def costs(states: np.ndarray) -> np.ndarray:
    """Return what every advisory costs in every state, [states, 5]."""
    return np.concatenate([_costs(states[i : i + _CHUNK]) for i in range(0, len(states), _CHUNK)])


def _costs(states: np.ndarray) -> np.ndarray:
    x = states.astype(np.float64)
    distance = (x[:, :1] + 0.5) * _RANGE
    bearing, heading = 2 * np.pi * x[:, 1:2], 2 * np.pi * x[:, 2:3]
    own = (x[:, 3:4] + 0.5) * np.diff(_OWN_SPEED) + _OWN_SPEED[0]
    intruder = (x[:, 4:5] + 0.5) * np.diff(_INTRUDER_SPEED) + _INTRUDER_SPEED[0]
    seconds = np.arange(_HORIZON + 1.0)
    worth = 1 / (1 + np.exp((seconds - _COUNTS_UNTIL) / _FADING))
    there = (
        distance * np.cos(bearing) + intruder * np.cos(heading) * seconds,
        distance * np.sin(bearing) + intruder * np.sin(heading) * seconds,
    )
    found = []
    for rate, price in zip(_TURN_RATES, _PRICES, strict=True):
        if rate:
            here = own * np.sin(rate * seconds) / rate, own * (1 - np.cos(rate * seconds)) / rate
        else:
            here = own * seconds, 0 * own * seconds
        apart = (there[0] - here[0]) ** 2 + (there[1] - here[1]) ** 2
        found.append((np.exp(-apart / _NEAR**2) * worth).max(axis=1) + price)
    return np.stack(found, axis=1)
