"""Problems of the kind that CUTEst collects, written from their formulas.

Each is a function of one vector with a start and the values of f at its minima. Sums of
squares of NIST's models, whose certified parameters give the minimum, come with them.

References:
    Gould, Orban and Toint (2015), CUTEst, Computational Optimization and Applications
    60: the collection that names most of them.
    Andrei (2008), An Unconstrained Optimization Test Functions Collection, Advanced
    Modeling and Optimization 10, 147-161: most of the formulas.
    Toint (1983), Test Problems for Partially Separable Optimization.
    NIST (1999), Statistical Reference Datasets, Nonlinear Regression.
"""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf

nist = runpy.run_path(str(Path(__file__).parent / "nist" / "problems.py"))


class Problem(NamedTuple):
    """f, the start, and what f is at its known minima."""

    objective: Callable
    start: list
    minima: list


def total(*terms):
    return tf.add_n([tf.reduce_sum(term) for term in terms])


def count(x, first=1):
    return tf.range(first, first + x.shape[0], dtype=x.dtype)


def arwhead(x):
    return total((x[:-1] ** 2 + x[-1] ** 2) ** 2, 3 - 4 * x[:-1])


def brkmcc(x):
    below = 1 - 0.25 * x[0] ** 2 - x[1] ** 2
    above = x[0] - 2 * x[1] + 1
    return (x[0] - 2) ** 2 + (x[1] - 1) ** 2 + 0.04 / below + 5 * above**2


def bdqrtic(x):
    a, b, c, d = (x[i : x.shape[0] - 4 + i] ** 2 for i in range(4))
    squares = a + 2 * b + 3 * c + 4 * d + 5 * x[-1] ** 2
    return total((3 - 4 * x[:-4]) ** 2, squares**2)


def biggsb1(x):
    return total((x[0] - 1) ** 2, (x[1:] - x[:-1]) ** 2, (1 - x[-1]) ** 2)


def broydn7d(x):
    half = x.shape[0] // 2
    padded = tf.pad(x, [[1, 1]])
    near = tf.abs(1 - padded[:-2] + (3 - 2 * x) * x - 2 * padded[2:])
    return total(near ** (7 / 3), tf.abs(x[:half] + x[half:]) ** (7 / 3))


def chained_wood(x):
    a, b, c, d = (x[i : x.shape[0] - 3 + i : 2] for i in range(4))
    return total(
        100 * (b - a**2) ** 2, (1 - a) ** 2, 90 * (d - c**2) ** 2, (1 - c) ** 2,
        10 * (b + d - 2) ** 2, 0.1 * (b - d) ** 2,
    )  # fmt: skip


def chnrosnb(x):
    a = 1.5 + 0.5 * tf.sin(count(x[1:], 2))
    return total(16 * a**2 * (x[:-1] - x[1:] ** 2) ** 2, (1 - x[1:]) ** 2)


def cliff(x):
    return ((x[0] - 3) / 100) ** 2 - (x[0] - x[1]) + tf.exp(20 * (x[0] - x[1]))


def cosine(x):
    return total(tf.cos(-0.5 * x[1:] + x[:-1] ** 2))


def cragglvy(x):
    a, b, c, d = (x[i : x.shape[0] - 3 + i : 2] for i in range(4))
    return total(
        (tf.exp(a) - b) ** 4, 100 * (b - c) ** 6,
        (tf.tan(c - d) + c - d) ** 4, a**8, (d - 1) ** 2,
    )  # fmt: skip


def cube(x):
    return total((x[:1] - 1) ** 2, 100 * (x[1:] - x[:-1] ** 3) ** 2)


def denschna(x):
    return x[0] ** 4 + (x[0] + x[1]) ** 2 + (tf.exp(x[1]) - 1) ** 2


def denschnb(x):
    return (x[0] - 2) ** 2 + ((x[0] - 2) * x[1]) ** 2 + (x[1] + 1) ** 2


def denschnc(x):
    first = x[0] ** 2 + x[1] ** 2 - 2
    return first**2 + (tf.exp(x[0] - 1) + x[1] ** 3 - 2) ** 2


def denschnd(x):
    a, b, c = tf.unstack(x)
    first = a**2 + b**3 - c**4
    return first**2 + (2 * a * b * c) ** 2 + (2 * a * b - 3 * b * c + a * c) ** 2


def denschne(x):
    a, b, c = tf.unstack(x)
    return a**2 + (b + b**2) ** 2 + (tf.exp(c) - 1) ** 2


def denschnf(x):
    a, b = tf.unstack(x)
    first = 2 * (a + b) ** 2 + (a - b) ** 2 - 8
    return first**2 + (5 * a**2 + (b - 3) ** 2 - 9) ** 2


def dixmaan(alpha, beta, gamma, delta, powers=(0, 0, 0, 0)):
    def f(x):
        n = x.shape[0]
        m, i = n // 3, count(x) / n
        a, b, c, d = powers
        second = x[:-1] * (x[1:] + x[1:] ** 2)
        return 1 + total(
            alpha * i**a * x**2,
            beta * i[:-1] ** b * second**2,
            gamma * i[: 2 * m] ** c * x[: 2 * m] ** 2 * x[m:] ** 4,
            delta * i[:m] ** d * x[:m] * x[2 * m :],
        )

    return f


def dixon3dq(x):
    return total((x[0] - 1) ** 2, (x[1:-1] - x[2:]) ** 2, (x[-1] - 1) ** 2)


def dqdrtic(x):
    return total(x[:-2] ** 2, 100 * x[1:-1] ** 2, 100 * x[2:] ** 2)


def edensch(x):
    a, b = x[:-1], x[1:]
    return 16 + total((a - 2) ** 4, (a * b - 2 * b) ** 2, (b + 1) ** 2)


def eg2(x):
    return total(tf.sin(x[0] + x[:-1] ** 2 - 1), tf.sin(x[-1] ** 2) / 2)


def eigenvalue(x):  # the least of tridiag(-1, 2, -1), a quotient without a scale
    padded = tf.pad(x, [[1, 1]])
    product = 2 * x - padded[:-2] - padded[2:]
    return total(x * product) / total(x**2)


def engval1(x):
    return total((x[:-1] ** 2 + x[1:] ** 2) ** 2, 3 - 4 * x[:-1])


def engval2(x):
    a, b, c = tf.unstack(x)
    square = a**2 + b**2
    parts = (
        square + c**2 - 1, square + (c - 2) ** 2 - 1, a + b + c - 1, a + b - c + 1,
        3 * b**2 + a**3 + (5 * c - a + 1) ** 2 - 36,
    )  # fmt: skip
    return tf.add_n([part**2 for part in parts])


def expfit(x):
    t = tf.range(1, 11, dtype=x.dtype) * 0.25
    return total((x[0] * tf.exp(x[1] * t) - t) ** 2)


def extended_exponentials(x):  # TET
    a, b = x[::2], x[1::2]
    return total(tf.exp(a + 3 * b - 0.1), tf.exp(a - 3 * b - 0.1), tf.exp(-a - 0.1))


def extended_himmelblau(x):
    a, b = x[::2], x[1::2]
    return total((a**2 + b - 11) ** 2, (a + b**2 - 7) ** 2)


def extended_maratos(x):
    a, b = x[::2], x[1::2]
    return total(a, 100 * (a**2 + b**2 - 1) ** 2)


def extended_white_holst(x):
    a, b = x[::2], x[1::2]
    return total(100 * (b - a**3) ** 2, (1 - a) ** 2)


def fletchcr(x):
    return total(100 * (x[1:] - x[:-1] + 1 - x[:-1] ** 2) ** 2)


def genhumps(x):
    a, b = x[:-1], x[1:]
    return total((tf.sin(2 * a) * tf.sin(2 * b)) ** 2, 0.05 * (a**2 + b**2))


def genrose(x):
    return 1 + total(100 * (x[1:] - x[:-1] ** 2) ** 2, (x[1:] - 1) ** 2)


def growth(x):  # GROWTHLS: the data of the collection, a model of three parameters
    t = tf.constant([8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 25], x.dtype)
    y = [8.0, 8.4305, 9.5294, 10.4627, 12.0, 13.0205, 14.5949, 16.1078, 18.0596,
         20.4569, 24.25, 32.9863]  # fmt: skip
    power = x[1] + tf.math.log(t) * x[2]
    return total((x[0] * t**power - tf.constant(y, x.dtype)) ** 2)


def hager(x):
    return total(tf.exp(x) - tf.sqrt(count(x)) * x)


def hairy(x):
    a, b = tf.unstack(x)
    waves = (tf.sin(7 * a) * tf.cos(7 * b)) ** 2
    slopes = 100 * tf.sqrt(0.01 + (a - b) ** 2) + 100 * tf.sqrt(0.01 + a**2)
    return 30 * waves + slopes


def hilbert(x):
    i = count(x)
    matrix = 1 / (i[:, None] + i - 1)
    return total(x * tf.linalg.matvec(matrix, x)) + 5 * total(x**2)


def himmelblau_bg(x):
    a, b = tf.unstack(x)
    return (2 * a**2 + 3 * b**2) * tf.exp(-a - b)


def himmelblau_h(x):
    a, b = tf.unstack(x)
    return -3 * a - 2 * b + 2 + a**3 + b**2


def humps(x):
    a, b = tf.unstack(x)
    return 0.05 * (a**2 + b**2) + (tf.sin(20 * a) * tf.sin(20 * b)) ** 2


def liarwhd(x):
    return total(4 * (x**2 - x[0]) ** 2, (x - 1) ** 2)


def logistic(x):
    generator = np.random.default_rng(5)
    rows = generator.normal(size=(60, x.shape[0])) * np.logspace(-1, 1, x.shape[0])
    signs = np.sign(rows @ generator.normal(size=x.shape[0]))
    signs[:12] *= -1
    logits = tf.linalg.matvec(tf.constant(rows, x.dtype), x)
    losses = tf.math.softplus(-tf.constant(signs, x.dtype) * logits)
    return tf.reduce_mean(losses) + 1e-4 * total(x**2)


def logros(x):
    return tf.math.log(1 + 1e4 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2)


def mancino_like(x):  # sums of powers, coupled everywhere
    i = count(x)
    v = tf.sqrt(x[:, None] ** 2 + i[:, None] / i)
    logs = tf.math.log(v)
    sums = tf.reduce_sum(v * (tf.sin(logs) ** 5 + tf.cos(logs) ** 5), axis=1)
    return total((14 * x.shape[0] * x + (i - x.shape[0] / 2) ** 3 + sums) ** 2)


def nondia(x):
    return total((x[0] - 1) ** 2, 100 * (x[0] - x[:-1] ** 2) ** 2)


def nondquar(x):
    quartics = (x[:-2] + x[1:-1] + x[-1]) ** 4
    return (x[0] - x[1]) ** 2 + total(quartics) + (x[-2] + x[-1]) ** 2


def palmer(odd):
    """A force field's energies by angle: even powers, or a quotient of them."""

    def f(x):
        t = tf.constant(np.linspace(-1.8, 1.8, 31), x.dtype)
        y = 40 * tf.cos(1.3 * t) ** 2 + 6 * t**4 / (1 + t**2) + tf.sin(9 * t) / 4
        if odd:
            model = x[0] * t**2 + x[1] / (x[2] ** 2 + t**2) + x[3] * t**4
        else:
            powers = t[:, None] ** (2 * tf.range(x.shape[0], dtype=x.dtype))
            model = tf.linalg.matvec(powers, x)
        return total((model - y) ** 2)

    return f


def perturbed_quadratic(x):
    return total(count(x) * x**2) + total(x) ** 2 / 100


def double_wells(x):  # a saddle near the start
    return total(x**4 - 2 * x**2, 0.1 * (x[1:] - x[:-1]) ** 2)


def power(x):
    return total(count(x) * x**2) ** 2


def quartc(x):
    return total((x - count(x)) ** 4)


def raydan1(x):
    return total(count(x) / 10 * (tf.exp(x) - x))


def schmvett(x):
    a, b, c = x[:-2], x[1:-1], x[2:]
    bell = tf.exp(-(((a + c) / b - 2) ** 2))
    return -total(1 / (1 + (a - b) ** 2), tf.sin((np.pi * b + c) / 2), bell)


def scurly(x):  # a banded quartic whose scales differ by 1e12
    n = x.shape[0]
    scales = tf.exp(12 * tf.range(n, dtype=x.dtype) / (n - 1))
    padded = tf.pad(x * scales, [[0, 3]])
    q = tf.add_n([padded[i : n + i] for i in range(4)])
    return total(q * (q * (q**2 - 20) - 0.1))


def sineval(x):
    return 1e4 * (x[1] - tf.sin(x[0])) ** 2 + x[0] ** 2 / 4


def sinquad(x):
    middle = tf.sin(x[1:-1] - x[-1]) - x[0] ** 2 + x[1:-1] ** 2
    return (x[0] - 1) ** 4 + total(middle**2) + (x[-1] ** 2 - x[0] ** 2) ** 2


def sisser(x):
    a, b = x[0] ** 2, x[1] ** 2
    return 3 * a**2 - 2 * a * b + 3 * b**2


def sparsine(x):
    n = x.shape[0]
    index = np.arange(1, n + 1)
    shifts = [(k * index - 1) % n for k in (2, 3, 5, 7, 11)]
    inner = tf.sin(x) + tf.add_n([tf.sin(tf.gather(x, s)) for s in shifts])
    return total(count(x) / 2 * inner**2)


def staircase(x):
    return total((tf.cumsum(x) - count(x)) ** 2)


def tointgss(x):
    a, b, c = x[:-2], x[1:-1], x[2:]
    weight = 10 / (x.shape[0] + 2)
    return total((weight + c**2) * (2 - tf.exp(-((a - b) ** 2) / (0.1 + c**2))))


def tquartic(x):
    return (x[0] - 1) ** 2 + total((x[0] ** 2 - x[1:] ** 2) ** 2)


def tridia(x):
    i = count(x[1:], 2)
    return (x[0] - 1) ** 2 + total(i * (2 * x[1:] - x[:-1]) ** 2)


def vareigvl(x):
    vector, value, n = x[:-1], x[-1], x.shape[0] - 1
    i = count(vector)
    matrix = tf.sin(i[:, None] * i) * tf.exp(-((i[:, None] - i) ** 2) / n)
    residual = tf.linalg.matvec(matrix, vector) - value * vector
    return total(tf.abs(residual) ** 1.5) + tf.abs(total(vector**2) - 1) ** 1.5


def zangwil2(x):
    a, b = tf.unstack(x)
    return (-56 * a - 256 * b + 16 * a**2 + 16 * b**2 - 8 * a * b + 991) / 15


def sum_of_squares(name):
    def f(x):
        dtype = x.dtype.as_numpy_dtype
        return total(nist["residuals"](name, tf, dtype)(x) ** 2)

    return f


def certified(name, start):
    problem = nist["read"](name)
    freedom = len(problem.y) - len(problem.certified)
    return Problem(
        sum_of_squares(name),
        list(problem.starts[start]),
        [problem.residual_std**2 * freedom],
    )


def alternating(n, *values):
    return list(values) * (n // len(values))


DIXMAAN = {
    "DIXMAANB": dixmaan(1, 0.0625, 0.0625, 0.0625, (0, 0, 0, 1)),
    "DIXMAANF": dixmaan(1, 0.0625, 0.0625, 0.0625, (1, 0, 0, 1)),
    "DIXMAANL": dixmaan(1, 0.26, 0.26, 0.26, (2, 0, 0, 2)),
}

PROBLEMS = {
    "ARWHEAD": Problem(arwhead, [1] * 50, [0]),
    "BDQRTIC": Problem(bdqrtic, [1] * 40, [138.4326079]),
    "BIGGSB1": Problem(biggsb1, [0] * 40, [0]),
    "BRKMCC": Problem(brkmcc, [2, 2], [0.1690426792]),
    "BROYDN7D": Problem(broydn7d, [1] * 20, [4.505272801, 5.026060873]),
    "chained Wood": Problem(chained_wood, alternating(20, -3, -1), [0]),
    "CHNROSNB": Problem(chnrosnb, [-1] * 25, [0]),
    "CLIFF": Problem(cliff, [0, -1], [0.1997866137]),
    "COSINE": Problem(cosine, [1] * 30, [-29]),
    "CRAGGLVY": Problem(cragglvy, [1] + [2] * 49, [15.37250947]),
    "CUBE": Problem(cube, [-1.2, 1], [0]),
    "CUBE 4": Problem(cube, [-1.2, 1, -1.2, 1], [0]),
    "DENSCHNA": Problem(denschna, [1, 1], [0]),
    "DENSCHNB": Problem(denschnb, [1, 1], [0]),
    "DENSCHNC": Problem(denschnc, [2, 3], [0]),
    "DENSCHND": Problem(denschnd, [10, 10, 10], [0]),
    "DENSCHNE": Problem(denschne, [2, 3, -8], [0]),
    "DENSCHNF": Problem(denschnf, [2, 0], [0]),
    **{name: Problem(f, [2] * 60, [1]) for name, f in DIXMAAN.items()},
    "DIXON3DQ": Problem(dixon3dq, [-1] * 40, [0]),
    "DQDRTIC": Problem(dqdrtic, [3] * 50, [0]),
    "EDENSCH": Problem(edensch, [0] * 36, [219.284592]),
    "EG2": Problem(eg2, [0] * 30, [-28.94742811]),
    "least eigenvalue": Problem(
        eigenvalue, [1 / i for i in range(1, 21)], [0.02233834755]
    ),
    "ENGVAL1": Problem(engval1, [2] * 50, [53.58221489]),
    "ENGVAL2": Problem(engval2, [1, 2, 0], [0]),
    "EXPFIT": Problem(expfit, [0, 0], [0.240510594]),
    "extended exponentials": Problem(extended_exponentials, [0.1] * 20, [25.59266697]),
    "extended Himmelblau": Problem(extended_himmelblau, [1] * 20, [0]),
    "extended Maratos": Problem(
        extended_maratos, alternating(10, 1.1, 0.1), [-5.003121103]
    ),
    "extended White-Holst": Problem(
        extended_white_holst, alternating(10, -1.2, 1), [0]
    ),
    "FLETCHCR": Problem(fletchcr, [0] * 30, [0]),
    "GENHUMPS": Problem(genhumps, [1.0] * 5, [0]),
    "GENROSE": Problem(genrose, [i / 31 for i in range(1, 31)], [1]),
    "GROWTHLS": Problem(growth, [100, 0, 0], [1.004040584]),
    "HAGER": Problem(hager, [1] * 30, [-42.55182296]),
    "HAIRY": Problem(hairy, [-5, -7], [20]),
    "HILBERTB": Problem(hilbert, [-3] * 10, [0]),
    "HIMMELBG": Problem(himmelblau_bg, [0.5, 0.5], [0]),
    "HIMMELBH": Problem(himmelblau_h, [0, 2], [-1]),
    "HUMPS": Problem(humps, [-5.06, -5.02], [0]),
    "LIARWHD": Problem(liarwhd, [4] * 36, [0]),
    "logistic regression": Problem(logistic, [0] * 8, [0.5108611972]),
    "LOGROS": Problem(logros, [-1.2, 1], [0]),
    "MANCINO": Problem(mancino_like, [0.0] * 10, [0]),
    "NONDIA": Problem(nondia, [-1] * 30, [0]),
    "NONDQUAR": Problem(nondquar, alternating(20, 1, -1), [0]),
    "PALMER, even": Problem(palmer(odd=False), [1] * 8, [0.937561665]),
    "PALMER, odd": Problem(palmer(odd=True), [1] * 4, [41.84269825]),
    "perturbed quadratic": Problem(perturbed_quadratic, [0.5] * 50, [0]),
    "double wells": Problem(double_wells, alternating(20, 0.1, -0.05), [-13.14062639]),
    "POWER": Problem(power, [1] * 20, [0]),
    "QUARTC": Problem(quartc, [2] * 25, [0]),
    "RAYDAN1": Problem(raydan1, [1] * 30, [46.5]),
    "SCHMVETT": Problem(schmvett, [0.5] * 30, [-84]),
    "SCURLY": Problem(scurly, [1e-4 * i / 11 for i in range(1, 11)], [-1003.162902]),
    "SINEVAL": Problem(sineval, [4.712389, -1], [0]),
    "SINQUAD": Problem(sinquad, [0.1] * 10, [0]),
    "SISSER": Problem(sisser, [1, 0.1], [0]),
    "SPARSINE": Problem(sparsine, [0.5] * 20, [0]),
    "staircase": Problem(staircase, [1.5] * 20, [0]),
    "TOINTGSS": Problem(tointgss, [3] * 20, [8.181818182, 8.636363636]),
    "TQUARTIC": Problem(tquartic, [0.1] * 20, [0]),
    "TRIDIA": Problem(tridia, [1] * 30, [0]),
    "VAREIGVL": Problem(vareigvl, [1] * 20, [0]),
    "ZANGWIL2": Problem(zangwil2, [3, 8], [-18.2]),
    "HAHN1": certified("Hahn1", 1),
    "GAUSS2": certified("Gauss2", 0),
    "KIRBY2": certified("Kirby2", 0),
    "MGH09": certified("MGH09", 0),
    "MGH09 near": certified("MGH09", 1),
    "MGH10": certified("MGH10", 1),
    "BENNETT5": certified("Bennett5", 0),
    "LANCZOS1": certified("Lanczos1", 1),
    "LANCZOS2": certified("Lanczos2", 0),
    "LANCZOS3": certified("Lanczos3", 0),
    "THURBER": certified("Thurber", 0),
    "BOXBOD": certified("BoxBOD", 0),
    "ECKERLE4": certified("Eckerle4", 1),
    "ENSO": certified("ENSO", 0),
    "MISRA1A": certified("Misra1a", 0),
    "NELSON": certified("Nelson", 1),
    "ROSZMAN1": certified("Roszman1", 1),
    "RAT43": certified("Rat43", 1),
}
