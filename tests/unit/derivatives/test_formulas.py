"""Gradients of the table where TensorFlow's are wrong or missing, by several roads."""

import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.derivatives.reverse import grad, vjp
from tfgrad.errors import NoGradientError

SINGULAR = tf.constant([[1.0, 2.0], [2.0, 4.0]], tf.float64)


def taped(f, x, v):
    """Return the Hessian of f times v, by a user's own tape around `grad`."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        slope = tf.reduce_sum(grad(f)(x) * v)
    return tape.gradient(slope, x)


def test_the_gradient_of_a_singular_determinant_is_the_adjugate():
    np.testing.assert_allclose(grad(tf.linalg.det)(SINGULAR), [[4, -2], [-2, 1]])


def test_a_determinant_of_zeros_has_no_slope_and_its_right_curvature():
    def corner(t):
        return tf.linalg.det(tf.linalg.diag(tf.stack([t, 2 * t, 3 * t])))

    np.testing.assert_allclose(grad(tf.linalg.det)(tf.zeros([3, 3])), np.zeros((3, 3)))
    assert float(grad(grad(grad(corner)))(0.0)) == pytest.approx(36.0)


def test_a_tape_around_the_gradient_of_a_determinant_is_right_where_it_is_singular():
    v = tf.constant([[1.0, 2.0], [3.0, 5.0]], tf.float64)

    np.testing.assert_allclose(taped(tf.linalg.det, SINGULAR, v), [[5, -3], [-2, 1]])


# The function, a point, and the second derivatives along ones there.
CURVATURES = {
    # -log(x) / (x - 1) is -1 + u / 2 - u**2 / 3 near 1, with u for x - 1.
    "spence": (tf.math.special.spence, [1.0, 1.005], [0.5, 0.5 - 1 / 300 + 3 / 160000]),
    "segment products": (
        lambda x: tf.math.unsorted_segment_prod(x, [1, 1, 0, 1, -1], 3),
        [0.0, 2.0, 7.0, 3.0, 5.0],
        [5.0, 3.0, 0.0, 2.0, 0.0],
    ),
    "a power of one": (lambda x: x**1.0 + x**2.0, [0.0, 1.0], [2.0, 2.0]),
    "softsign": (tf.nn.softsign, [1.0, -3.0], [-0.25, 1 / 32]),
}


@pytest.mark.parametrize("name", CURVATURES)
def test_curvatures(name):
    f, x, expected = CURVATURES[name]
    total = lambda x: tf.reduce_sum(f(x))  # noqa: E731  one line
    x, ones = tf.constant(x, tf.float64), tf.ones(len(x), tf.float64)

    np.testing.assert_allclose(taped(total, x, ones), expected, rtol=1e-5)
    np.testing.assert_allclose(tfgrad.hvp(total)(x, ones), expected, rtol=1e-5)
    hessian = tf.function(lambda x: tfgrad.hessian(total)(x))(x)
    np.testing.assert_allclose(tf.reduce_sum(hessian, 1), expected, rtol=1e-5)


def test_a_scaled_bessel_function_has_finite_derivatives_at_zero():
    bessel = tf.math.special.bessel_i1e

    assert float(grad(bessel)(0.0)) == 0.5
    assert np.isfinite(taped(bessel, tf.constant(0.0), 1.0))


def test_hues_of_negative_colors():
    colors = np.random.default_rng(0).normal(size=(4, 3))
    f = lambda x: tf.reduce_sum(tf.sin(tf.image.rgb_to_hsv(x)))  # noqa: E731  one line

    expected, _ = tfgrad.finite_difference(f, colors)

    np.testing.assert_allclose(grad(f)(colors), expected, rtol=1e-6, atol=1e-8)


def test_what_has_first_derivatives_only_is_pulled_back_all_the_same():
    f = lambda a: tf.math.igamma(a, tf.constant(0.5, tf.float64))  # noqa: E731
    a = tf.constant(0.7, tf.float64)

    y, pullback = vjp(f, a)

    assert float(y) == pytest.approx(float(f(a)))
    expected = float(grad(f)(a))
    assert [float(pullback(u)[0]) for u in (1.0, 2.0)] == [expected, 2 * expected]


def test_a_tape_around_what_has_first_derivatives_only_is_refused_by_name():
    f = lambda a: tf.math.igamma(a, tf.constant(0.5, tf.float64))  # noqa: E731

    with pytest.raises(NoGradientError, match="IgammaGradA"):
        taped(f, tf.constant(0.7, tf.float64), 1.0)


def test_an_error_stays_what_it_is_on_its_way_through_a_users_function():
    @tf.function
    def slope(x):
        return grad(lambda x: tf.reduce_sum(tf.round(x)))(x)

    with pytest.raises(NoGradientError, match=r"tf\.round"):
        slope(tf.constant([1.2]))
