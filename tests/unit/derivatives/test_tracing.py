"""One compiled function per signature; what cannot be compiled runs eagerly."""

import linecache
import logging
import threading
import warnings

import numpy as np
import pytest
import tensorflow as tf

from tfgrad.derivatives.matrices import hessian, hvp, jacobian
from tfgrad.derivatives.reverse import grad
from tfgrad.derivatives.tracing import (
    MANY,
    MOST_TRACES,
    Traces,
    as_written,
    quiet,
    suited,
)
from tfgrad.errors import InvalidArgumentError, NoGradientError


def counted(f):
    """Return `f` and the list that grows whenever its Python code runs."""
    runs = []

    def function(*args, **kwargs):
        runs.append(args)
        return f(*args, **kwargs)

    return function, runs


def squares_of(run=lambda f, x: f(x), **options):
    return Traces(run, lambda x: x**2, jit=False, **options)


def test_a_thousand_floats_trace_once():
    f, runs = counted(lambda x: x**2)
    slope = grad(f)

    answers = [float(slope(float(x))) for x in range(1000)]

    assert answers == [2.0 * x for x in range(1000)]
    assert len(runs) == 1


def test_each_shape_dtype_and_structure_traces_once():
    f, runs = counted(lambda x: tf.reduce_sum(tf.stack(tf.nest.flatten(x)) ** 2))
    slope = grad(f)
    points = [
        tf.ones(2),
        tf.ones(3),
        tf.ones(3, tf.float64),
        (tf.ones(2), tf.ones(2)),
        [tf.ones(2), tf.ones(2)],
        {"a": tf.ones(2)},
    ]

    for point in points * 3:
        slope(point)

    assert len(runs) == len(points)


def test_a_static_argument_traces_once_per_value():
    f, runs = counted(lambda x, power: x**power)
    slope = grad(f)

    answers = [float(slope(3.0, power)) for power in (2, 3, 2, 3)]

    assert answers == [6.0, 27.0, 6.0, 27.0]
    assert len(runs) == 2


def test_traces_are_dropped_when_there_are_too_many():
    traces = squares_of()
    first = tf.ones(1)
    traces(first)

    for n in range(2, MOST_TRACES + 2):
        traces(tf.ones(n))

    with pytest.raises(KeyError):
        traces.graph(first)
    assert traces.graph(tf.ones(MOST_TRACES + 1)) is not None


def test_python_branches_and_loops_on_tensors_compile():
    def f(x):
        while x > 1.0:
            x = x / 2
        if x > 0.7:
            return 3 * x
        return x

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = [float(grad(f)(x)) for x in (8.0, 5.0)]

    assert answers == [3 / 8, 1 / 8]


def test_a_function_that_branches_in_numpy_runs_eagerly_with_one_warning_at_its_line():
    def f(x):
        return x**3 if x.numpy() > 1 else x  # the line to be named

    slope = grad(f)
    with pytest.warns(RuntimeWarning, match="the line to be named") as caught:
        first = slope(2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        others = [slope(0.5), slope(tf.constant(3.0, tf.float64))]

    assert [float(first), *map(float, others)] == [12.0, 1.0, 27.0]
    assert len(caught) == 1
    assert caught[0].filename == __file__
    shown = linecache.getline(__file__, caught[0].lineno)
    assert "first = slope(2.0)" in shown


def test_a_function_that_is_wrong_everywhere_raises_its_own_error():
    def f(x):
        raise ZeroDivisionError("of my own")

    with pytest.raises(ZeroDivisionError, match="of my own") as caught:
        grad(f)(1.0)

    assert caught.traceback[-1].name == "f"


def test_numpy_in_the_path_is_refused_with_its_line():
    def f(x):
        return x * np.sin(x.numpy())  # numpy is here

    with pytest.raises(NoGradientError, match="numpy is here") as caught:
        grad(f)(1.0)

    assert "`x`" in caught.value.rule
    assert caught.value.hint == "the tensor itself, without .numpy()"


def test_numpy_beside_the_path_gives_the_right_answer():
    f = lambda x: x**2 + 0.0 * len(str(x.numpy()))  # noqa: E731  one line is the point

    with pytest.warns(RuntimeWarning, match="runs eagerly"):
        answer = grad(f)(3.0)

    assert float(answer) == 6.0


@pytest.mark.parametrize("transform", [hvp, hessian, jacobian])
def test_an_error_without_a_message_in_a_trace_has_its_name_in_the_warning(transform):
    def f(x):
        if not tf.executing_eagerly():
            raise AssertionError
        return tf.reduce_sum(x**3)

    given = ([1.0, 2.0], [1.0, 0.0]) if transform is hvp else ([1.0, 2.0],)

    with pytest.warns(RuntimeWarning, match=r"\(AssertionError\)"):
        answer = transform(f)(*given)

    right = {hvp: [6, 0], hessian: [[6, 0], [0, 12]], jacobian: [3, 12]}[transform]
    np.testing.assert_allclose(answer, right, rtol=1e-5)


def test_a_custom_gradient_in_a_branch_is_differentiated_twice():
    @tf.custom_gradient
    def cube(x):
        return x**3, lambda dy: 3 * x**2 * dy

    def f(x):  # TensorFlow fails with an assertion of its own while it is traced
        return tf.reduce_sum(tf.cond(x[0] > 0, lambda: cube(x), lambda: x))

    with pytest.warns(RuntimeWarning, match="AssertionError"):
        product = hvp(f)([1.0, 2.0], [1.0, 1.0])

    np.testing.assert_allclose(product, [6, 12], rtol=1e-5)


def test_jit_gives_the_answer_of_the_graph():

    def f(x):
        return tf.reduce_sum(tf.sin(x) ** 3)

    x = tf.linspace(0.0, 2.0, 7)

    np.testing.assert_allclose(grad(f, jit=True)(x), grad(f)(x), rtol=1e-6)


def test_a_failed_check_is_made_again():
    checks = []

    def check(answer, x):
        checks.append(float(answer))
        if len(checks) == 1:
            raise ArithmeticError("once")

    traces = squares_of(check=check)

    with pytest.raises(ArithmeticError, match="once"):
        traces(tf.constant(3.0))
    answers = [float(traces(tf.constant(x))) for x in (3.0, 4.0)]

    assert answers == [9.0, 16.0]
    assert checks == [9.0, 9.0]


def test_what_xla_cannot_compile_is_refused_with_its_line():
    def summed(x):
        return tf.reduce_sum(tf.math.segment_sum(x**2, [0, 0, 1]))

    def looped(x):
        return tf.while_loop(lambda x: x < 9.0, lambda x: (x**2,), (x,))[0]

    with pytest.raises(
        InvalidArgumentError, match=r"SegmentSum at test_tracing(.|\n)*jit"
    ):
        grad(summed, jit=True)([1.0, 2.0, 3.0])
    with pytest.raises(InvalidArgumentError, match="maximum_iterations"):
        grad(looped, jit=True)(2.0)


def test_other_threads_wait_until_an_answer_is_checked():
    started, order = threading.Event(), []

    def check(answer, x):
        started.set()
        other.join(0.2)  # it cannot end before the check does
        order.append("checked")

    def call():
        started.wait()
        order.append(float(traces(tf.constant(3.0))))

    traces = squares_of(check=check)
    other = threading.Thread(target=call)
    other.start()
    traces(tf.constant(2.0))
    other.join()

    assert order == ["checked", 9.0]


def test_as_written_restores_the_options_it_found():
    options = tf.config.optimizer
    before = options.get_experimental_options()

    with as_written():
        within = options.get_experimental_options()

    assert within["constant_folding"] is False
    assert options.get_experimental_options() == before


@pytest.mark.parametrize(
    ("f", "size", "is_usual"),
    [
        (tf.square, MANY, True),
        (tf.square, MANY - 1, False),
        (lambda x: tf.function(tf.square)(x)[0], MANY, True),
        # Constant folding gets it wrong.
        (lambda x: tf.dynamic_partition(x, [0, 1] * (MANY // 2), 2)[1], MANY, False),
    ],
)
def test_large_graphs_are_optimised_within_as_written_unless_that_is_wrong(
    f, size, is_usual
):
    options = tf.config.optimizer.get_experimental_options
    spec = tf.TensorSpec([size])
    graph = tf.function(f, autograph=False).get_concrete_function(spec).graph
    before = options()

    with as_written(optimized=False):
        written = options()
        with suited(graph):
            within = options()
        after = options()

    assert within == (before if is_usual else written)
    assert after == written != before
    assert options() == before
    with suited(graph):  # there is nothing to be undone
        assert options() == before


def test_quiet_silences_tensorflow_and_only_within():
    logger = tf.get_logger()
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger.addHandler(handler)
    try:
        with quiet():
            logger.error("dropped")
        logger.error("kept")
    finally:
        logger.removeHandler(handler)

    assert [record.getMessage() for record in records] == ["kept"]


def test_a_trace_whose_first_call_has_failed_is_checked_by_the_next():
    checked = []

    def run(f, x):
        with tf.control_dependencies([tf.debugging.assert_positive(x)]):
            return f(x)

    def check(answer, *nests):
        checked.append(float(answer))

    traces = Traces(run, lambda x: 2 * x, jit=False, check=check, opens=True)
    with pytest.raises(tf.errors.InvalidArgumentError):
        traces(tf.constant(-1.0))
    traces(tf.constant(1.0))

    assert checked == [2.0]


def in_a_branch(act):
    return lambda x: tf.cond(x > 0, lambda: act(x), lambda: x)


def in_a_loop(act):
    return lambda x: tf.while_loop(
        lambda i: i < 2, lambda i: [act(x) * 0 + i + 1], [0.0]
    )


def in_a_call(act):
    return lambda x: tf.function(act)(x)


@pytest.mark.parametrize("place", [lambda act: act, in_a_branch, in_a_loop, in_a_call])
def test_what_a_function_does_besides_is_done_in_turn(place):
    total = tf.Variable(1.0)

    def act(x):
        total.assign_add(1.0)
        total.assign(total * 3)
        tf.debugging.assert_less(x, 9.0)
        return x + 0 * total

    def f(x):
        place(act)(x)
        return x**2

    f(2.0)
    eager = total.numpy()
    for _ in range(2):
        total.assign(1.0)
        assert float(grad(f)(2.0)) == 4.0
        assert total.numpy() == eager
    with pytest.raises(tf.errors.InvalidArgumentError, match="did not hold"):
        grad(f)(10.0)


def test_a_function_that_reads_draws_and_waits_is_traced_once():
    scale = tf.Variable(3.0)

    def f(x):
        with tf.control_dependencies([tf.debugging.Assert(x[0] < 9.0, [x])]):
            return tf.reduce_sum(scale * x**2) + 0 * tf.random.normal([])

    f, runs = counted(f)
    slope = grad(f)
    slope(tf.constant([1.0, 2.0]))

    assert len(runs) == 1
    with pytest.raises(tf.errors.InvalidArgumentError):
        slope(tf.constant([9.0, 2.0]))
