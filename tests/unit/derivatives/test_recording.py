"""A recorded evaluation: gradients that are dense, never None, and refused when cut."""

import numpy as np
import pytest
import tensorflow as tf

from tfgrad.derivatives.calls import Call
from tfgrad.derivatives.matrices import jacobian
from tfgrad.derivatives.outputs import float_outputs as floats
from tfgrad.derivatives.outputs import objective, with_aux
from tfgrad.derivatives.recording import Recording, dense
from tfgrad.derivatives.reverse import grad, vjp
from tfgrad.errors import NoGradientError


def record(f, *args, variables=None, **options):
    argnums = tuple(range(len(args)))
    names = ("x", "y", "z")[: len(args)]
    call = Call(f, "f", names, tuple(map(tf.constant, args)), {}, argnums, variables)
    return Recording(with_aux(floats, False), call, **options)


def traced(run):
    """Return what `run()` returns when it is called in a trace."""
    return tf.function(run, autograph=False)()


def test_gradients_weigh_the_outputs():
    recording = record(lambda x: (x**2, x**3), [1.0, 2.0])

    (answer,) = recording.gradients([tf.constant([1.0, 1.0]), tf.constant([0.0, 10.0])])

    assert answer.numpy().tolist() == [2.0, 4.0 + 120.0]


def test_output_aux_and_sources_are_kept():
    call = Call(lambda x: (x**2, "aux"), "f", ("x",), (tf.constant(3.0),), {}, 0, None)

    recording = Recording(objective(True), call, has_aux=True)

    assert (float(recording.output), recording.aux) == (9.0, "aux")
    assert [float(x) for x in recording.sources] == [3.0]


def test_the_variables_that_f_reads_can_be_found():
    v, frozen = tf.Variable(2.0), tf.Variable(3.0, trainable=False)

    recording = record(lambda: v**2 * frozen, variables=())

    assert [source.ref() for source in recording.sources] == [v.ref()]
    assert [float(g) for g in recording.gradients()] == [12.0]


def test_a_recording_can_be_pulled_back_many_times():
    recording = record(lambda x: x**2, [1.0, 2.0], persistent=True)
    recording.require_sound()

    rows = [recording.pull([row])[0].numpy().tolist() for row in tf.eye(2)]

    assert rows == [[2.0, 0.0], [0.0, 4.0]]


def test_slices_become_dense_and_none_becomes_zeros():
    source = tf.ones([3, 2])
    slices = tf.IndexedSlices(tf.ones([2, 2]), tf.constant([2, 2]))

    assert dense(slices, source).numpy().tolist() == [[0, 0], [0, 0], [2, 2]]
    assert dense(None, source).numpy().tolist() == [[0, 0]] * 3


def test_an_op_without_gradient_is_named_even_if_other_paths_lead_around_it():
    def f(x):
        return tf.reduce_sum(x**2) + tf.reduce_sum(tf.unique(x)[0])  # unique is here

    with pytest.raises(NoGradientError, match=r"tf.unique at .*unique is here"):
        grad(f)([1.0, 2.0])


def test_an_output_cut_behind_another_is_seen_when_looked_at_separately():
    def separately(flag):
        recording = record(lambda x: (x**2, tf.round(x)), 1.5, persistent=True)
        recording.require_sound(separately=flag)
        return recording.pull([tf.ones([]), tf.ones([])])

    assert [float(g) for g in traced(lambda: separately(False))] == [3.0]
    with pytest.raises(NoGradientError, match=r"tf.round"):
        traced(lambda: separately(True))


@pytest.mark.parametrize("part", ["all", "some"])
def test_numpy_function_on_the_path_is_refused(part):
    def f(x):
        outside = tf.ensure_shape(tf.numpy_function(np.sin, [x], x.dtype), [])
        return outside + x if part == "some" else outside

    with pytest.raises(
        NoGradientError, match=r"tf.numpy_function at test_recording.py"
    ):
        grad(f)(1.0)


@pytest.mark.parametrize("part", ["all", "some"])
def test_numpy_in_a_py_function_is_refused_with_its_line(part):
    def f(x):
        outside = tf.py_function(lambda a: np.sin(a.numpy()), [x], x.dtype)  # in here
        outside = tf.ensure_shape(outside, [])
        return outside + x if part == "some" else outside

    with pytest.raises(NoGradientError, match=r"tf.py_function at .*in here"):
        grad(f)(1.0)


@pytest.mark.filterwarnings("ignore:.*runs eagerly")
def test_tensorflow_in_a_py_function_is_differentiated():
    def f(x):
        return x + tf.ensure_shape(tf.py_function(tf.sin, [x], x.dtype), [])

    assert float(grad(f)(1.0)) == pytest.approx(1 + np.cos(1.0))


def test_what_cannot_be_verified_inside_of_a_users_function_is_refused_there():
    def f(x):
        return x + tf.ensure_shape(tf.py_function(tf.sin, [x], x.dtype), [])

    with pytest.raises(NoGradientError, match=r"outside of tf.function"):
        tf.function(grad(f))(tf.constant(1.0))


def test_python_that_only_looks_on_is_no_cut():
    seen = []

    def f(x):
        tf.py_function(lambda a: seen.append(float(a)), [x], [])
        tf.numpy_function(lambda a: np.float32(0), [x], tf.float32)
        return x**2

    assert float(grad(f)(3.0)) == 6.0
    assert seen == [3.0]


def test_positions_found_in_numpy_are_piecewise_constant():
    def f(x):
        (index,) = tf.numpy_function(lambda a: [np.argmax(a)], [x], [tf.int64])
        return tf.gather(x, index) ** 2

    assert grad(f)([1.0, 3.0, 2.0]).numpy().tolist() == [0.0, 6.0, 0.0]


def test_a_custom_gradient_around_numpy_is_trusted():
    @tf.custom_gradient
    def f(x):
        y = tf.ensure_shape(tf.numpy_function(np.sin, [x], x.dtype), [])
        return y, lambda dy: dy * tf.cos(x)

    assert float(grad(lambda x: x + f(x))(0.5)) == pytest.approx(1 + np.cos(0.5))


def test_stopped_numpy_means_zero():
    def f(x):
        outside = tf.numpy_function(np.sin, [tf.stop_gradient(x)], x.dtype)
        return x**2 + tf.ensure_shape(outside, [])

    assert float(grad(f)(3.0)) == 6.0


def test_a_value_that_goes_through_a_variable_is_refused():
    state = tf.Variable(5.0)

    def kept(x):
        state.assign(x)
        return state * x

    def read_before(x):
        y = state * x
        state.assign(x)
        return y

    with pytest.raises(NoGradientError, match="assign"):
        grad(kept)(3.0)
    state.assign(5.0)
    assert float(grad(read_before)(3.0)) == 5.0


@pytest.mark.parametrize("wrt", [False, True])
def test_eager_functions_are_verified_source_by_source(wrt):
    v, w = tf.Variable(2.0), tf.Variable(0.5)

    def f(a, b):
        return a**2 * np.float32(np.sin(b.numpy()))

    call = (lambda: f(v, w)) if wrt else f
    slope = grad(call, wrt=[v, w]) if wrt else grad(call, (0, 1))

    with pytest.raises(NoGradientError, match="wrt" if wrt else "`b`"):
        slope() if wrt else slope(2.0, 0.5)
    assert (float(v), float(w)) == (2.0, 0.5)


def looped(body):
    return lambda x: tf.while_loop(
        lambda i, y: i < 2, lambda i, y: (i + 1, body(y, x)), (0, x)
    )[1]


TRANSFORMS = {
    "grad": lambda f, x: grad(f)(x),
    "jacobian": lambda f, x: jacobian(f)(x),
    "vjp": lambda f, x: vjp(f, x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_cut_inside_of_a_loop_is_refused_though_tensorflow_says_zero(name):
    f = looped(lambda y, x: tf.round(y))

    with pytest.raises(NoGradientError, match=r"tf.round at test_recording"):
        TRANSFORMS[name](f, 1.2)


def test_a_cut_in_both_branches_is_refused():

    def f(x):
        return tf.cond(x > 0, lambda: tf.round(x), lambda: tf.floor(x))

    with pytest.raises(NoGradientError, match=r"tf.round"):
        grad(f)(1.2)


def test_a_way_around_a_cut_inside_of_a_loop_or_branch_is_the_gradient():
    functions = [
        looped(lambda y, x: y + tf.round(y)),
        looped(lambda y, x: tf.round(y) + x),
        looped(lambda y, x: tf.where(y > 0, y, 2 * y)),
        lambda x: tf.cond(x > 0, lambda: x, lambda: tf.round(x)),
        lambda x: tf.map_fn(lambda a: tf.where(a > 0, a, 2 * a), x[None])[0],
    ]

    assert [float(grad(f)(1.2)) for f in functions] == [1.0] * 5
