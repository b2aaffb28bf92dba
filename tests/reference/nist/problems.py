"""NIST's nonlinear regression problems: read the files, write the models down once.

The models are written for any array library: `residuals("Misra1a", tf)` and, where
benchmarks ask another one, `residuals("Misra1a", jax.numpy)`.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

FOLDER = Path(__file__).parent


class Problem(NamedTuple):
    starts: np.ndarray  # [2, n]
    certified: np.ndarray  # parameters, [n]
    stderr: np.ndarray  # their certified standard deviations, [n]
    residual_std: float
    x: np.ndarray
    y: np.ndarray


def read(name):
    text = (FOLDER / f"{name}.dat").read_text()
    head, data = text.rsplit("Data: ", 1)
    rows = re.findall(r"^\s*b\d+ =(.*)$", head, re.MULTILINE)
    table = np.array([row.split() for row in rows], float)
    numbers = np.array([line.split() for line in data.splitlines()[1:] if line.strip()])
    y, x = numbers.astype(float)[:, 0], numbers.astype(float)[:, 1:]
    return Problem(
        starts=table[:, :2].T,
        certified=table[:, 2],
        stderr=table[:, 3],
        residual_std=float(head.split("Residual Standard Deviation:")[1].split()[0]),
        x=x if x.shape[1] > 1 else x[:, 0],
        y=np.log(y) if name == "Nelson" else y,
    )


def residuals(name, library, dtype=np.float64):
    """Return the function from parameters to model less data."""
    problem = read(name)
    x, y = problem.x.astype(dtype), problem.y.astype(dtype)
    if name == "Nelson":
        x = (x[:, 0], x[:, 1])
    model = MODELS[name]
    count = len(problem.certified)

    def misfit(b):
        return model(library, x, *(b[i] for i in range(count))) - y

    return misfit


def _atan(library, x):
    return (library.atan if hasattr(library, "atan") else library.arctan)(x)


def chwirut(np, x, b1, b2, b3):
    return np.exp(-b1 * x) / (b2 + b3 * x)


def lanczos(np, x, b1, b2, b3, b4, b5, b6):
    return b1 * np.exp(-b2 * x) + b3 * np.exp(-b4 * x) + b5 * np.exp(-b6 * x)


def gauss(np, x, b1, b2, b3, b4, b5, b6, b7, b8):
    peaks = b3 * np.exp(-((x - b4) ** 2) / b5**2)
    return b1 * np.exp(-b2 * x) + peaks + b6 * np.exp(-((x - b7) ** 2) / b8**2)


def cubics(np, x, b1, b2, b3, b4, b5, b6, b7):
    below = 1 + b5 * x + b6 * x**2 + b7 * x**3
    return (b1 + b2 * x + b3 * x**2 + b4 * x**3) / below


def enso(np, x, b1, b2, b3, b4, b5, b6, b7, b8, b9):
    year, first, second = (2 * math.pi * x / period for period in (12, b4, b7))
    return (
        b1 + b2 * np.cos(year) + b3 * np.sin(year)
        + b5 * np.cos(first) + b6 * np.sin(first)
        + b8 * np.cos(second) + b9 * np.sin(second)
    )  # fmt: skip


MODELS = {
    "Bennett5": lambda np, x, b1, b2, b3: b1 * (b2 + x) ** (-1 / b3),
    "BoxBOD": lambda np, x, b1, b2: b1 * (1 - np.exp(-b2 * x)),
    "Chwirut1": chwirut,
    "Chwirut2": chwirut,
    "DanWood": lambda np, x, b1, b2: b1 * x**b2,
    "ENSO": enso,
    "Eckerle4": lambda np, x, b1, b2, b3: b1 / b2 * np.exp(-(((x - b3) / b2) ** 2) / 2),
    "Gauss1": gauss,
    "Gauss2": gauss,
    "Gauss3": gauss,
    "Hahn1": cubics,
    "Kirby2": lambda np, x, b1, b2, b3, b4, b5: (
        (b1 + b2 * x + b3 * x**2) / (1 + b4 * x + b5 * x**2)
    ),
    "Lanczos1": lanczos,
    "Lanczos2": lanczos,
    "Lanczos3": lanczos,
    "MGH09": lambda np, x, b1, b2, b3, b4: b1 * (x**2 + x * b2) / (x**2 + x * b3 + b4),
    "MGH10": lambda np, x, b1, b2, b3: b1 * np.exp(b2 / (x + b3)),
    "MGH17": lambda np, x, b1, b2, b3, b4, b5: (
        b1 + b2 * np.exp(-x * b4) + b3 * np.exp(-x * b5)
    ),
    "Misra1a": lambda np, x, b1, b2: b1 * (1 - np.exp(-b2 * x)),
    "Misra1b": lambda np, x, b1, b2: b1 * (1 - (1 + b2 * x / 2) ** -2),
    "Misra1c": lambda np, x, b1, b2: b1 * (1 - (1 + 2 * b2 * x) ** -0.5),
    "Misra1d": lambda np, x, b1, b2: b1 * b2 * x / (1 + b2 * x),
    "Nelson": lambda np, x, b1, b2, b3: b1 - b2 * x[0] * np.exp(-b3 * x[1]),
    "Rat42": lambda np, x, b1, b2, b3: b1 / (1 + np.exp(b2 - b3 * x)),
    "Rat43": lambda np, x, b1, b2, b3, b4: b1 / (1 + np.exp(b2 - b3 * x)) ** (1 / b4),
    "Roszman1": lambda np, x, b1, b2, b3, b4: (
        b1 - b2 * x - _atan(np, b3 / (x - b4)) / math.pi
    ),
    "Thurber": cubics,
}
