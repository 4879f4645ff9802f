"""Two aircraft in one plane, what each advisory costs, and the table a network learns from.

The own ship is at the origin and flies along the x axis; y points to its left. An encounter has five values:

    distance     of the intruder, m
    bearing      of the intruder from the own ship's nose, rad, left is positive
    heading      of the intruder relative to the own ship's, rad, left is positive
    own speed, intruder speed, m/s

Under an advisory the own ship turns at a fixed rate while the intruder flies straight on. With d(t) the distance
between them, the advisory costs

    price + max over t of exp(-(d(t) / 800 m)^2) / (1 + exp((t - 18 s) / 3 s))

so closeness counts in full where it comes soon and hardly where it is half a minute away. The cheapest advisory is the
advice.
"""

from __future__ import annotations

import numpy as np

ADVISORIES = ("clear of conflict", "weak left", "weak right", "strong left", "strong right")
VALUES = ("distance", "bearing", "heading", "own speed", "intruder speed")

# Inputs are normalised: each of these ranges becomes [-0.5, 0.5].
LOW = np.array([0.0, -np.pi, -np.pi, 60.0, 0.0])
HIGH = np.array([10_000.0, np.pi, np.pi, 260.0, 260.0])

_TURN = np.deg2rad([0.0, 2.0, -2.0, 4.0, -4.0])
_PRICE = np.array([0.0, 0.05, 0.05, 0.1, 0.1])
_TIMES = np.arange(0.0, 37.0)
_NEAR = 800.0
_SOON, _FADE = 18.0, 3.0

_ROWS_AT_ONCE = 20_000


def draw(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw normalised encounters evenly from the whole domain."""
    return rng.uniform(-0.5, 0.5, (count, len(VALUES))).astype(np.float32)


def costs(x: np.ndarray) -> np.ndarray:
    """Return what every advisory costs, [N, 5], for normalised encounters [N, 5]."""
    parts = [_costs(x[start : start + _ROWS_AT_ONCE]) for start in range(0, len(x), _ROWS_AT_ONCE)]
    return np.concatenate(parts)


def table(rng: np.random.Generator, count: int, turning: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw encounters and their costs; a share of `turning` is drawn only from those where the advice is to turn.

    Everywhere such encounters are few, and a network that learned from an even sample would hardly see them.
    """
    wanted = round(turning * count)
    x = [draw(rng, count - wanted)]
    y = [costs(x[0])]
    while wanted:
        drawn = draw(rng, count)
        priced = costs(drawn)
        rows = np.flatnonzero(priced.argmin(axis=1))[:wanted]
        x.append(drawn[rows])
        y.append(priced[rows])
        wanted -= len(rows)
    return np.concatenate(x), np.concatenate(y)


def _costs(x: np.ndarray) -> np.ndarray:
    values = LOW + (x.astype(np.float64) + 0.5) * (HIGH - LOW)
    distance, bearing, heading, own_speed, speed = (column[:, None] for column in values.T)
    intruder_x = distance * np.cos(bearing) + speed * np.cos(heading) * _TIMES
    intruder_y = distance * np.sin(bearing) + speed * np.sin(heading) * _TIMES
    urgency = 1 / (1 + np.exp((_TIMES - _SOON) / _FADE))
    columns = []
    for turn, price in zip(_TURN, _PRICE, strict=True):
        if turn:
            own_x = own_speed * np.sin(turn * _TIMES) / turn
            own_y = own_speed * (1 - np.cos(turn * _TIMES)) / turn
        else:
            own_x, own_y = own_speed * _TIMES, 0.0
        squared = (intruder_x - own_x) ** 2 + (intruder_y - own_y) ** 2
        columns.append(price + (np.exp(-squared / _NEAR**2) * urgency).max(axis=1))
    return np.stack(columns, axis=1)
