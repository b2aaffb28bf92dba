"""L-BFGS within bounds on problems whose bounds are active, beside SciPy's L-BFGS-B."""

import functools

import numpy as np
import pytest
import scipy.optimize
import tensorflow as tf

import tfgrad
from tests.reference.bounded import PROBLEMS
from tests.reference.harness import Objective, run
from tfgrad.optimize.compiled import KEPT
from tfgrad.optimize.methods import bounded
from tfgrad.optimize.methods.lbfgs import LBFGS
from tfgrad.optimize.methods.protocol import Point

Y = np.array([1.1, 0.2, 0.7, 1.9, 1.4])

UNITS = [(1, 1), (1e-12, 1), (1e12, 1)]  # of f; bounds are in units of x


class Watched(Objective):
    """An objective that remembers how far from the box it was evaluated."""

    def __init__(self, problem, dtype=tf.float64):
        super().__init__(problem.objective, len(problem.start), dtype)
        self.box = [bound.astype(dtype.as_numpy_dtype) for bound in problem.bounds]
        self.outside = 0
        traced = self.evaluate

        def evaluate(x):
            lower, upper = self.box
            self.outside += bool(np.any((x.numpy() < lower) | (x.numpy() > upper)))
            return traced(x)

        self.evaluate = evaluate


@functools.cache
def objective(name):
    return Watched(PROBLEMS[name])


def start(problem):
    return np.clip(np.array(problem.start, float), *problem.bounds)


@functools.cache
def solved(name, units=(1, 1)):
    problem = PROBLEMS[name]
    method = LBFGS(bounds=problem.bounds)
    return run(method, objective(name), start(problem), units=units, most=2000)


def scipy_counts(name):
    """Return what SciPy needs with its defaults, and to all digits."""
    problem, f = PROBLEMS[name], objective(name)
    f.units.assign((1, 1))
    bounds = scipy.optimize.Bounds(*problem.bounds)

    def value_and_grad(x):
        value, gradient = f.evaluate(tf.constant(x))
        return np.nan_to_num(value.numpy(), nan=1e100), gradient.numpy()

    return [
        scipy.optimize.minimize(
            value_and_grad, start(problem), jac=True, method="L-BFGS-B",
            bounds=bounds, options=options,
        ).nfev
        for options in ({}, {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000})
    ]  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_best_known_minimum_within_the_bounds_is_found_and_claimed(name):
    (best,) = PROBLEMS[name].minima

    for units in UNITS:
        end = solved(name, units)

        assert end.success, units
        # PROBPENL, 1e9 times as steep one way as others, ends 1e-14 of its fall above.
        digits = 2e-3 if name == "PROBPENL" else 1e-7
        assert end.fun / units[0] == pytest.approx(best, rel=digits, abs=1e-10)
    assert objective(name).outside == 0


def test_fewer_evaluations_than_scipy_takes_to_the_same_accuracy():
    counts = [scipy_counts(name)[1] for name in PROBLEMS]

    ours = [solved(name).evaluations for name in PROBLEMS]

    assert np.median(ours) <= np.median(counts)


INFINITE_SLOPES = {
    "a corner": (lambda x: tf.reduce_sum(tf.sqrt(x)) + (x[0] - 0.2) ** 2, (0, 0)),
    "two sides": (lambda x: tf.reduce_sum(tf.sqrt(x) + tf.sqrt(2 - x)), (0, 2)),
    "beside others": (lambda x: tf.sqrt(x[0]) + (x[0] + x[1] - 0.5) ** 2, (0, 0.5)),
    "an angle": (lambda x: tf.acos(x[0] - 1) + (x[1] - 0.25) ** 2, (2, 0.25)),
}


@pytest.mark.parametrize("name", INFINITE_SLOPES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_bound_where_f_rises_infinitely_steeply_holds(name, dtype):
    f, at = INFINITE_SLOPES[name]

    result = tfgrad.minimize(f, np.array([0.8, 1.1], dtype), bounds=(0, 2))

    assert result.success
    np.testing.assert_allclose(result.x, at, atol=1e-3 if dtype == "float32" else 1e-7)
    assert result.nfev < 50


def test_a_start_that_an_infinite_slope_holds_is_one_and_one_that_it_drives_is_not():
    held = tfgrad.minimize(
        lambda x: tf.sqrt(x[0]) + (x[1] - 1) ** 2, [0.0, 0.0], bounds=(0, None)
    )
    driven = tfgrad.minimize(lambda x: (tf.sqrt(x) - 1) ** 2, 0.0, bounds=(0, None))

    assert held.success
    np.testing.assert_allclose(held.x, [0, 1])
    assert (driven.status, driven.nit) == ("nonfinite", 0)


def test_one_compiled_update_serves_all_bounds():
    def f(x):
        return tf.reduce_sum((x - 3) ** 4)

    tfgrad.minimize(f, np.zeros(3), bounds=(-1, 1))
    before = set(KEPT)
    result = tfgrad.minimize(f, np.zeros(3), bounds=(-1, [1, 2, 5]))

    assert set(KEPT) == before
    np.testing.assert_allclose(result.x[:2], [1, 2])


@pytest.mark.parametrize("name", ["HS2", "HS5", "EXPLIN", "MCCORMCK", "HATFLDB"])
def test_float32_stays_within_the_bounds_and_gets_there(name):
    problem = PROBLEMS[name]
    f = Watched(problem, tf.float32)

    end = run(LBFGS(bounds=problem.bounds), f, start(problem), most=500)

    assert end.fun == pytest.approx(problem.minima[0], rel=1e-4)
    assert f.outside == 0


def test_no_value_outside_is_asked_for_where_there_is_none():
    def f(x):  # NaN below 0, and steeply down towards it
        return tf.reduce_sum(tf.sqrt(x) + 0.1 * (x - 4) ** 2)

    box = np.zeros(2), np.full(2, 9.0)
    end = run(LBFGS(bounds=box), Objective(f, 2), [5.0, 3.0])

    assert end.success
    slope = 0.5 / np.sqrt(end.x) + 0.2 * (end.x - 4)
    np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_a_start_in_a_corner_that_is_the_solution_is_one():
    f = Objective(lambda x: tf.reduce_sum((x + 1) ** 2), 3)
    box = np.zeros(3), np.full(3, np.inf)

    end = run(LBFGS(bounds=box), f, [0.0, 0.0, 0.0])

    assert end.success
    assert end.fun == 3
    np.testing.assert_array_equal(end.x, 0)


def test_a_degenerate_corner_is_a_solution():
    # At (0, 0) both bounds hold, and the gradient of the second one vanishes.
    f = Objective(lambda x: x[0] + x[0] * x[1] + x[1] ** 2 + 5, 2)
    box = np.zeros(2), np.ones(2)

    end = run(LBFGS(bounds=box), f, [0.9, 0.7])

    assert end.success
    np.testing.assert_allclose(end.x, 0, atol=1e-7)


def test_a_valley_that_float32_pairs_do_not_see_is_not_claimed_at_its_side():
    def badly_scaled(x):  # Powell's
        sides = tf.exp(-x[0]) + tf.exp(-x[1]) - 1.0001
        return (1e4 * x[0] * x[1] - 1) ** 2 + sides**2

    box = np.zeros(2), np.full(2, np.inf)
    end = run(LBFGS(bounds=box), Objective(badly_scaled, 2, tf.float32), [0.0, 1.0])

    assert end.fun < 1e-6


@pytest.mark.parametrize("slant", [0, 1e-3])
def test_where_f_does_not_curve_up_the_steps_get_longer(slant):
    def f(x):  # concave in x[1] but near 0
        return 10 * (x[0] - 1 - slant * x[1]) ** 2 + tf.math.log(1 + x[1] ** 2)

    box = np.full(2, -5000.0), np.full(2, 5000.0)
    end = run(LBFGS(bounds=box), Objective(f, 2), [3.0, 1000.0], most=100)

    assert end.success
    np.testing.assert_allclose(end.x, [1, 0], atol=1e-6)


def test_newtons_step_beside_a_bound_is_believed_only_if_it_moves_all():
    def badly_scaled(x):  # Powell's: x[0] is nearer to its bound than differences reach
        sides = tf.exp(-x[0]) + tf.exp(-x[1]) - 1.0001
        return (1e4 * x[0] * x[1] - 1) ** 2 + sides**2

    start = np.array([0.80500292, 7.46352632])
    result = tfgrad.minimize(badly_scaled, start, bounds=([0, 1], [1, 9]))

    assert not result.success or result.fun == pytest.approx(1.5126e-10, rel=1e-4)


def test_a_step_that_rounding_leaves_no_length_is_no_failure():
    def badly_scaled(x):  # Brown's; at the bound of x[1], only x[0] is free
        return (x[0] - 1e6) ** 2 + (x[1] - 2e-6) ** 2 + (x[0] * x[1] - 2) ** 2

    box = np.array([0, 3e-5]), np.array([1e6, 100.0])
    end = run(LBFGS(bounds=box), Objective(badly_scaled, 2), [1.0, 1.0])

    assert end.success
    assert end.fun == pytest.approx(784.0)


def test_a_kink_within_bounds_is_not_claimed():
    f = Objective(lambda x: tf.abs(x[0] - 1) + 0.3 * x[0] + x[1], 2)
    box = np.zeros(2), np.full(2, 20.0)

    end = run(LBFGS(bounds=box), f, [9.0, 3.0], most=500)

    assert not end.success


@pytest.mark.parametrize("bounds", [None, (np.full(3, -1.0), np.full(3, 0.8))])
def test_updates_of_many_problems_at_once_are_those_of_each(bounds):
    method = LBFGS(memory=5, bounds=bounds)
    x = tf.constant(np.random.default_rng(1).uniform(-1, 0.8, (4, 3)))

    def point(x):
        return Point(x, tf.reduce_sum((x - 2) ** 4), 4 * (x - 2) ** 3)

    def two_moves(x):
        start = point(x)
        first = method.init(start)
        return method.update(point(first.x), start, first.state)

    together = tf.vectorized_map(two_moves, x, fallback_to_while_loop=False)

    for i in range(4):
        one = two_moves(x[i])
        np.testing.assert_allclose(together.x[i], one.x, rtol=1e-12)
        np.testing.assert_allclose(together.expected[i], one.expected, rtol=1e-9)
        assert bool(together.accepted[i]) == bool(one.accepted)


def test_minimize_stays_within_the_bounds_of_a_nest_and_says_so():
    seen = []

    def likelihood(p):  # of a normal distribution; below 0, sigma has no logarithm
        z = (Y - p["mean"]) / p["sigma"]
        return tf.reduce_mean(z**2) / 2 + tf.math.log(p["sigma"])

    result = tfgrad.minimize(
        likelihood,
        {"mean": np.float64(30.0), "sigma": np.float64(0.05)},
        bounds=({"mean": None, "sigma": 1e-9}, {"mean": 0.9, "sigma": None}),
        callback=lambda state: seen.append(float(state.x["mean"])),
    )

    assert (result.status, result.success) == ("converged", True)
    assert float(result.x["mean"]) == 0.9
    assert float(result.x["sigma"]) == pytest.approx(np.sqrt(np.mean((Y - 0.9) ** 2)))
    assert max(seen) <= 0.9


def test_variables_are_minimised_within_bounds_under_xla_as_in_calls():
    results = []
    for jit in (True, False):
        x = tf.Variable([2.0, 2.0], dtype=tf.float64)
        result = tfgrad.minimize(
            lambda x=x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2, wrt=x, jit=jit,
            bounds=([-2.0, -2.0], [0.5, 2.0]),
        )  # fmt: skip
        results.append(result)
        np.testing.assert_array_equal(x, result.x)

    for result in results:
        assert result.success
        np.testing.assert_allclose(result.x, [0.5, 0.25], rtol=1e-6)


def test_gtol_asks_for_the_slope_that_no_bound_holds():
    result = tfgrad.minimize(
        lambda x: tf.reduce_sum((x + 1) ** 2), [3.0, 2.0], bounds=(0.0, None), gtol=1e-6
    )

    assert result.status == "gtol"
    np.testing.assert_array_equal(result.x, [0.0, 0.0])


@pytest.mark.parametrize(("n", "m"), [(100, 10), (60, 40), (3000, 10)])
def test_the_direction_is_that_of_the_free_parts_of_the_pairs(n, m):
    generator = np.random.default_rng(n)
    kept, free = m + 3, generator.random(n) > 0.3
    pairs, gradient = np.zeros((m, 2, n)), free * generator.normal(size=n)
    for k in range(kept):
        s = generator.normal(size=n)
        pairs[k % m] = s, s * (1 + free) + 0.01 * generator.normal(size=n)

    direction, is_known = bounded._direction(
        tf.constant(pairs), tf.constant(kept), tf.constant(gradient), tf.constant(free)
    )

    ordered = [pairs[k % m] * free for k in range(kept - m, kept)]
    left, parts = gradient.copy(), []
    for s, y in reversed(ordered):  # the two loops, Nocedal and Wright, algorithm 7.4
        parts.append((s @ left) / (s @ y))
        left -= parts[-1] * y
    s, y = ordered[-1]
    left *= (s @ y) / (y @ y)
    for s, y in ordered:
        left += s * (parts.pop() - (y @ left) / (s @ y))
    assert is_known
    np.testing.assert_allclose(direction, -left, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(direction.numpy()[~free], 0)
