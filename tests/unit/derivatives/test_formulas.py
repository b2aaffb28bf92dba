"""Gradients of the table where TensorFlow's are wrong or missing, by several roads."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.derivatives.reverse import grad, vjp
from tfgrad.errors import NoGradientError, WrongDerivativeError

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


@pytest.mark.parametrize("n", [5, 9])
def test_larger_singular_determinants_inside_of_a_users_function(n):
    x = np.random.default_rng(n).normal(size=(n, n))
    x[0] = x[1]
    v = tf.constant(np.random.default_rng(0).normal(size=(n, n)))
    slopes = tf.function(lambda x: grad(tf.linalg.det)(x))
    product = tf.function(lambda x: tfgrad.hvp(tf.linalg.det)(x, v))

    first, _ = tfgrad.finite_difference(tf.linalg.det, x)
    second, _ = tfgrad.finite_difference(slopes, x, v)

    close = {"rtol": 1e-6, "atol": 1e-7}
    np.testing.assert_allclose(slopes(tf.constant(x)), first, **close)
    np.testing.assert_allclose(product(tf.constant(x)), second, **close)


def test_the_logarithm_of_no_determinant_has_no_slope_and_raises_nothing():
    f = tf.function(lambda x: grad(lambda x: tf.linalg.slogdet(x)[1])(x))

    assert np.isnan(f(tf.ones((5, 5)))).all()


# Functions by eigenvectors and singular vectors.


def by_eigenvectors(x):
    values, vectors = tf.linalg.eigh(x)
    return tf.matmul(vectors * tf.exp(values), vectors, adjoint_b=True)


def by_singular_vectors(x):
    s, u, v = tf.linalg.svd(x)
    return tf.matmul(u / tf.cast(s + 1, x.dtype), v, adjoint_b=True)


def by_orthogonal_factor(x):
    q, r = tf.linalg.qr(x)
    return tf.matmul(q, r, adjoint_b=True) if x.shape[0] == x.shape[1] else q


def weighed(f):
    """Return a number that all elements of f go into, each by another weight."""

    def total(x):
        y = f(x)
        weights = tf.reshape(tf.cos(tf.range(9.0)[: tf.size(y)]), y.shape)
        return tf.reduce_sum(tf.math.real(y) * tf.cast(weights, x.dtype.real_dtype))

    return total


def complex_of(f):
    return lambda x: f(tf.complex(x, x**2))


ANY = np.random.default_rng(0).normal(size=(3, 3))
SYMMETRIC = ANY + ANY.T
REPEATED = np.array([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 3.0]])

DECOMPOSED = {
    "eigenvectors": (weighed(by_eigenvectors), SYMMETRIC),
    "square": (weighed(by_singular_vectors), ANY),
    "tall": (weighed(by_singular_vectors), ANY[:, :2]),
    "wide": (weighed(by_singular_vectors), ANY[:2]),
    "the spectral norm": (lambda x: tf.norm(x, 2, axis=[0, 1]), ANY[:2]),
    "complex, square": (complex_of(weighed(by_singular_vectors)), ANY),
    "complex, tall": (complex_of(weighed(by_singular_vectors)), ANY[:, :2]),
    "factors, square": (weighed(by_orthogonal_factor), ANY),
    "factors, tall": (weighed(by_orthogonal_factor), ANY[:, :2]),
    "factors, wide": (weighed(lambda x: tf.linalg.qr(x)[1]), ANY[:2]),
    "factors, complex": (complex_of(weighed(by_orthogonal_factor)), ANY),
    "singular values": (
        lambda x: tf.reduce_sum(tf.exp(tf.linalg.svd(x, compute_uv=False))),
        ANY,
    ),
}


@pytest.mark.parametrize("name", DECOMPOSED)
def test_decompositions_twice(name):
    f, x = DECOMPOSED[name]
    v = SYMMETRIC[: x.shape[0], : x.shape[1]] * np.abs(x).max()

    first, _ = tfgrad.finite_difference(f, x, v)
    second, _ = tfgrad.finite_difference(grad(f), x, v)

    np.testing.assert_allclose(np.sum(grad(f)(x) * v), first, rtol=1e-6)
    np.testing.assert_allclose(tfgrad.hvp(f)(x, v), second, rtol=1e-5)


def test_eigenvalues_that_are_small_are_no_repeated_ones():
    def scaled(x):
        values, vectors = tf.linalg.eigh(x)
        return tf.matmul(vectors * tf.exp(1e12 * values), vectors, adjoint_b=True)

    expected = grad(weighed(by_eigenvectors))(SYMMETRIC)

    answer = grad(weighed(scaled))(1e-12 * SYMMETRIC)

    np.testing.assert_allclose(1e-12 * answer, expected, rtol=1e-6)


REPEATING = {
    "eigenvectors": (weighed(by_eigenvectors), REPEATED),
    "singular vectors": (weighed(by_singular_vectors), np.eye(3)),
    "the pseudoinverse": (weighed(tf.linalg.pinv), np.eye(3)[[1, 2, 0]] * 2),
    "columns": (weighed(by_orthogonal_factor), ANY[:, [0, 1, 0]]),
    "columns up to rounding": (weighed(by_orthogonal_factor), ANY[:, :2] @ ANY[:2]),
}


@pytest.mark.parametrize("name", REPEATING)
def test_no_slope_is_made_up_where_values_repeat(name):
    f, x = REPEATING[name]
    second = tfgrad.jvp(lambda x: grad(f)(x), (x,), (SYMMETRIC,))[1]

    assert not np.isfinite(second).all()
    assert not np.isfinite(tf.function(lambda x: grad(f)(x))(tf.constant(x))).all()
    with pytest.raises(WrongDerivativeError, match=r"singular|eigen|columns"):
        grad(f)(x)


@pytest.mark.parametrize("name", REPEATING)
def test_nor_in_forward_mode_where_the_trace_is_an_old_one(name):
    f, x = REPEATING[name]
    compiled, generic = tf.function(f), (ANY + 5 * np.diag([1.0, 2.0, 3.0]),)

    assert np.isfinite(tfgrad.jvp(compiled, generic, (SYMMETRIC,))[1])
    assert not np.isfinite(tfgrad.jvp(compiled, (x,), (SYMMETRIC,))[1])


def test_slopes_of_the_values_alone_are_known_where_they_repeat():
    values = lambda x: tf.reduce_sum(tf.exp(tf.linalg.eigh(x)[0]))  # noqa: E731
    one = lambda x: tf.linalg.eigh(x)[1][0, 0] ** 2  # noqa: E731  of a simple value
    x = np.diag([1.0, 3.0, 3.0])

    np.testing.assert_allclose(grad(values)(x), np.diag(np.exp([1.0, 3.0, 3.0])))
    np.testing.assert_allclose(grad(one)(x), np.zeros((3, 3)))
    assert float(tfgrad.jvp(one, (x,), (SYMMETRIC,))[1]) == 0.0


def test_slices_of_sparse_tensors_are_differentiated_twice():
    def f(values):
        tensor = tf.SparseTensor([[0, 1], [1, 2], [1, 3]], values, [2, 4])
        return tf.sparse.slice(tensor, [0, 2], [2, 2]).values ** 3

    x = np.array([1.0, 2.0, 3.0])

    np.testing.assert_allclose(tfgrad.jvp(f, (x,), (x,))[1], [24.0, 81.0])
    np.testing.assert_allclose(
        tfgrad.hessian(lambda x: tf.reduce_sum(f(x)))(x), np.diag([0.0, 12.0, 18.0])
    )


def test_sums_of_sparse_tensors_are_differentiated_twice():
    def f(values):
        one = tf.SparseTensor([[0, 0], [0, 2]], values, [1, 4])
        other = tf.SparseTensor([[0, 1], [0, 2]], values**2, [1, 4])
        return tf.reduce_sum(tf.sparse.add(one, other).values ** 2)

    x, v = tf.constant([1.0, 3.0], tf.float64), tf.constant([1.0, 1.0], tf.float64)

    # That is x[0]**2 + x[0]**4 + (x[1] + x[1]**2)**2.
    np.testing.assert_allclose(tfgrad.hvp(f)(x, v), [14, 146])
    np.testing.assert_allclose(taped(f, x, v), [14, 146])


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


def divided_by_norms(labels, x):
    return -tf.reduce_sum(labels * x / tf.maximum(tf.norm(x, axis=1), 0.1)[:, None], 1)


@pytest.mark.parametrize(
    "loss", [keras.losses.cosine_similarity, divided_by_norms], ids=["keras", "maximum"]
)
def test_the_curvature_of_a_row_of_zeros_that_is_normalised(loss):
    x = tf.constant([[0.0, 0.0], [3.0, 4.0]])
    labels = tf.constant([[0.0, 0.0], [1.0, 0.0]])

    curvature = taped(lambda x: tf.reduce_sum(loss(labels, x)), x, tf.ones_like(x))

    # The Hessian of -x / sqrt(x**2 + y**2) at (3, 4) times (1, 1).
    expected = [[0.0, 0.0], [136 / 3125, -77 / 3125]]
    np.testing.assert_allclose(curvature, expected, rtol=1e-4)


def test_hues_of_negative_colors():
    colors = np.random.default_rng(0).normal(size=(4, 3))
    f = lambda x: tf.reduce_sum(tf.sin(tf.image.rgb_to_hsv(x)))  # noqa: E731  one line

    expected, _ = tfgrad.finite_difference(f, colors)

    np.testing.assert_allclose(grad(f)(colors), expected, rtol=1e-6, atol=1e-8)


def test_the_curvature_of_products_of_segments_at_zeros():
    f = lambda x: tf.reduce_sum(tf.math.segment_prod(x, [0, 0, 0, 2]))  # noqa: E731
    x = tf.constant([0.0, 2.0, 3.0, 0.0], tf.float64)
    expected = [[0, 3, 2, 0], [3, 0, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]]

    np.testing.assert_allclose(tfgrad.hessian(f)(x), expected)
    np.testing.assert_allclose(taped(f, x, [1.0, 0, 0, 0]), expected[0])


@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
def test_the_curvature_of_a_weighted_loss_at_the_tie(label):
    def f(z):
        return tf.nn.weighted_cross_entropy_with_logits(label, z, 3.0)

    # The loss is (1 - label) z + (1 + 2 label) log(1 + exp(-z)).
    slope, curvature = (1 - label) - (1 + 2 * label) / 2, (1 + 2 * label) / 4

    np.testing.assert_allclose(grad(f)(0.0), slope, rtol=1e-6)
    np.testing.assert_allclose(tfgrad.hvp(f)(0.0, 1.0), curvature, rtol=1e-6)
    np.testing.assert_allclose(taped(f, tf.constant(0.0), 1.0), curvature, rtol=1e-6)


@pytest.mark.parametrize(
    "library", [keras.ops, tf.experimental.numpy], ids=["keras", "numpy"]
)
def test_a_sum_of_exponentials_where_both_are_equal(library):
    f = lambda x: tf.reduce_sum(library.logaddexp(x[0], x[1]))  # noqa: E731
    x, v = tf.constant([[1.0], [1.0]], tf.float64), [[1.0], [0.0]]

    np.testing.assert_allclose(grad(f)(x), [[0.5], [0.5]])
    np.testing.assert_allclose(tfgrad.hvp(f)(x, v), [[0.25], [-0.25]])
    np.testing.assert_allclose(taped(f, x, v), [[0.25], [-0.25]])


def test_the_square_of_a_norm_is_flat_at_zero():
    f = lambda x: tf.math.reduce_euclidean_norm(x) ** 2  # noqa: E731

    np.testing.assert_allclose(grad(f)(np.zeros(3)), np.zeros(3))
    np.testing.assert_allclose(grad(f)(np.array([3.0, 4.0])), [6.0, 8.0])


# Functions of rows, in segments one of which is empty.
SEGMENTS = {
    "mean": lambda x: tf.math.segment_mean(x, [0, 0, 2]),
    "max": lambda x: tf.math.segment_max(x, [0, 0, 2]),
    "min": lambda x: tf.math.segment_min(x, [0, 0, 2]),
    "unsorted max": lambda x: tf.gather(
        tf.math.unsorted_segment_max(x, [2, -1, 2], 3), [2]
    ),
    "sparse": lambda x: tf.sparse.segment_sum(x, [0, 2, 0], [0, 0, 1]),
    "sparse means": lambda x: tf.sparse.segment_mean(
        x, [0, 2, 2], [0, 3, 3], num_segments=5
    ),
    "sparse, by roots": lambda x: tf.sparse.segment_sqrt_n(x, [0, 2, 0], [0, 1, 1]),
    "embeddings": lambda x: tf.nn.embedding_lookup_sparse(
        x, tf.sparse.from_dense([[1, 2], [2, 0]]), None, combiner="mean"
    ),
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_segments_forward_and_twice(name):
    f = lambda x: tf.reduce_sum(tf.sin(SEGMENTS[name](x)))  # noqa: E731  one line
    slope, _ = tfgrad.finite_difference(f, ANY, SYMMETRIC)
    curvature, _ = tfgrad.finite_difference(grad(f), ANY, SYMMETRIC)

    close = {"rtol": 1e-6, "atol": 1e-8}
    np.testing.assert_allclose(tfgrad.jvp(f, (ANY,), (SYMMETRIC,))[1], slope, **close)
    np.testing.assert_allclose(tfgrad.hvp(f)(ANY, SYMMETRIC), curvature, **close)


@pytest.mark.parametrize("low", [0.5, 3.0])
def test_a_clip_between_limits_that_may_cross(low):
    x, limits = np.array([-1.0, 0.7, 2.0, 5.0]), np.array([low, 1.0])

    def f(limits):
        return tf.reduce_sum(tf.clip_by_value(x, limits[0], limits[1]) ** 2)

    slopes, curvature = ([8 * low, 0], 8) if low > 1 else ([2 * low, 4], 2)

    np.testing.assert_allclose(grad(f)(limits), slopes)
    np.testing.assert_allclose(tfgrad.hvp(f)(limits, [1.0, 0.0])[0], curvature)


SQUARES = {
    "pow": lambda x: tf.abs(x) ** 2,
    "square": lambda x: tf.square(tf.abs(x)),
    "product": lambda x: tf.abs(x) * tf.abs(x),
}


@pytest.mark.parametrize("name", SQUARES)
@pytest.mark.parametrize("alone", [True, False])
def test_the_square_of_an_absolute_value_at_zero_by_a_tape_of_ones_own(name, alone):
    def f(x):
        return tf.reduce_sum(SQUARES[name](x) + tf.sin(x))

    x, v = tf.constant([0.0, -2.0], tf.float64), np.array([1.0, 3.0])
    by_tape = taped if alone else tf.function(taped)

    np.testing.assert_allclose(by_tape(f, x, v), (2 - np.sin(x)) * v)
    np.testing.assert_allclose(grad(f)(x), 2 * x + np.cos(x))


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


@pytest.mark.parametrize("power", [2, 3])
def test_the_curvature_of_complex_powers_at_zero_by_a_tape_of_ones_own(power):
    x = tf.constant([0.0, 2.0], tf.float64)

    with tf.GradientTape() as tape:
        tape.watch(x)
        slope = grad(
            lambda x: tf.reduce_sum(tf.math.real(tf.cast(x, tf.complex128) ** power))
        )(x)

    right = {2: [2, 2], 3: [0, 12]}[power]
    np.testing.assert_allclose(tape.gradient(slope, x), right)
