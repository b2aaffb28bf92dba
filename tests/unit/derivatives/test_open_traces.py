import threading

import pytest
import tensorflow as tf

from tfgrad.derivatives.signatures import MOST_TRACES, OpenTraces


def traces_of(seen):
    traces = OpenTraces()

    def trace(specs):
        seen.append([spec.shape.as_list() for spec in specs])
        return len(seen)

    return lambda nests: traces.of(nests, trace)


def test_the_second_shape_opens_the_dimension_that_differs():
    seen = []
    traces = traces_of(seen)
    found = [traces(tf.zeros([n, 3])) for n in (4, 4, 5, 6, 4, 1)]

    assert seen == [[[4, 3]], [[None, 3]]]
    assert found == [1, 1, 2, 2, 1, 2]


def test_each_dimension_is_opened_by_itself():
    seen = []
    traces = traces_of(seen)
    for shape in ([4, 3], [5, 3], [5, 2]):
        traces(tf.zeros(shape))

    assert seen == [[[4, 3]], [[None, 3]], [[None, None]]]


@pytest.mark.parametrize(
    "other",
    [tf.zeros([2, 2]), tf.zeros([2], tf.float64), [tf.zeros([2])], (tf.zeros([2]), 1)],
    ids=["rank", "dtype", "structure", "static"],
)
def test_what_is_no_dimension_has_a_trace_of_its_own(other):
    seen = []
    traces = traces_of(seen)

    assert traces(tf.zeros([2])) != traces(other)
    assert all(None not in shape for shapes in seen for shape in shapes)


def test_static_values_are_told_apart():
    traces = traces_of([])

    assert traces((tf.zeros([2]), True)) != traces((tf.zeros([2]), False))


def test_ragged_and_sparse_tensors_are_opened_likewise():
    seen = []
    traces = traces_of(seen)
    for rows in ([[1], [2, 3]], [[1], [2], [3]], [[4]]):
        traces(tf.ragged.constant(rows))

    assert seen == [[[2, None]], [[None, None]]]


def test_where_the_open_trace_fails_each_shape_has_its_own():
    seen = []

    def trace(specs):
        if None in specs[0].shape.as_list():
            raise TypeError
        seen.append(specs[0].shape[0])
        return tuple(seen)

    traces = OpenTraces()
    found = [traces.of(tf.zeros([n]), trace) for n in (1, 2, 3, 2)]

    assert seen == [1, 2, 3]
    assert found[3] == found[1]


def test_an_error_of_the_first_trace_is_raised():
    def trace(specs):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        OpenTraces().of(tf.zeros([1]), trace)


def test_shapes_without_end_do_not_fill_the_memory():
    seen = []
    traces = OpenTraces()
    for n in range(3 * MOST_TRACES):
        traces.of(tf.zeros([n]), lambda specs: seen.append(specs) or len(seen))

    assert len(seen) == 2
    assert len(traces._known) <= 2 * MOST_TRACES


def test_two_threads_make_one_trace():
    seen = []
    traces = traces_of(seen)
    both = threading.Barrier(2)

    def call():
        both.wait()
        traces(tf.zeros([2]))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(seen) == 1
