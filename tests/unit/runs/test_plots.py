import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.errors import InvalidArgumentError, RunError
from tfgrad.runs.plots import (
    box_around,
    coordinate_names,
    plot_path,
    plot_runs,
    values_at,
)
from tfgrad.runs.run import Run


def bowl(x):
    return (x[0] - 1) ** 2 + 4 * x[1] ** 2


def minimized(f=bowl, x0=(3.0, 2.0), **options):
    start = None if "wrt" in options else np.array(x0)
    return tfgrad.minimize(
        f, start, method="sgd", learning_rate=0.05, steps=10, **options
    )


# --- the grid -------------------------------------------------------------------------


def test_a_box_has_room_around_the_path():
    ((left, right), (bottom, top)) = box_around(np.array([[0.0, 1.0], [4.0, 3.0]]))

    assert (left, right) == (-1.0, 5.0)
    assert (bottom, top) == (0.5, 3.5)


@pytest.mark.parametrize(
    "path", [[[2.0, 3.0]], [[0.0, 0.0]], [[0.0, 1.0], [4.0, 1.0]]], ids=str
)
def test_a_box_is_never_flat(path):
    for low, high in box_around(np.array(path)):
        assert low < high


POINTS = np.array([[1.0, 0.0], [3.0, 2.0], [0.0, -1.0]])
VALUES = [0.0, 20.0, 5.0]


def test_values_are_those_of_the_function():
    like = tf.constant([0.0, 0.0], tf.float64)

    np.testing.assert_allclose(values_at(bowl, POINTS, like), VALUES)


def test_values_of_a_nest_of_two_dtypes_are_those_of_the_function():
    def f(point):
        return (point["a"] - 1) ** 2 + tf.cast(4 * point["b"][0] ** 2, tf.float32)

    like = {"a": tf.constant(0.0), "b": tf.constant([0.0], tf.float64)}
    np.testing.assert_allclose(values_at(f, POINTS, like), VALUES)


def test_variables_are_moved_over_the_grid_and_put_back():
    x = tf.Variable([7.0, 8.0])

    np.testing.assert_allclose(values_at(lambda: bowl(x), POINTS, x, [x]), VALUES)
    np.testing.assert_array_equal(x, [7.0, 8.0])


def test_a_function_that_needs_numpy_is_evaluated_point_by_point():
    def f(x):
        return tf.constant(bowl(x.numpy()))

    like = tf.constant([0.0, 0.0], tf.float64)
    np.testing.assert_allclose(values_at(f, POINTS, like), VALUES)


def test_a_function_that_raises_is_named_with_its_error():
    def f(x):
        raise KeyError("no")

    with pytest.raises(InvalidArgumentError, match=r"(?s)got: KeyError.*wrt="):
        values_at(f, POINTS, tf.constant([0.0, 0.0]))


# --- plot_path ------------------------------------------------------------------------


def test_two_parameters_are_a_contour_with_the_path():
    result = minimized()
    axes = plot_path(bowl, result).axes[0]

    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    np.testing.assert_allclose(lines["path"], result.history["x"])
    np.testing.assert_allclose(lines["start"], [[3.0, 2.0]])
    np.testing.assert_allclose(lines["end"], [result.x])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("x[0]", "x[1]")
    assert axes.get_title().startswith("bowl: 10 steps to ")
    assert axes.collections  # the contour itself


def test_one_parameter_is_a_graph_with_the_path():
    result = minimized(lambda x: x**2 + x - 1, 3.0)
    axes = plot_path(lambda x: x**2 + x - 1, result).axes[0]

    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    x, y = lines["f"].T
    np.testing.assert_allclose(y, x**2 + x - 1, atol=1e-12)
    np.testing.assert_allclose(lines["path"][:, 1], result.history["fun"])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("x", "f")


def test_a_function_of_variables_is_drawn_and_they_stay():
    x = tf.Variable([3.0, 2.0])
    result = minimized(lambda: bowl(x), wrt=x)
    plot_path(lambda: bowl(x), result, wrt=x)

    np.testing.assert_array_equal(x, result.x)


def test_a_function_with_holes_is_drawn_around_them():
    def f(x):
        return tf.math.log(x[0]) + x[1] ** 2

    result = minimized(f, (0.2, 1.0))
    assert plot_path(f, result)._repr_png_().startswith(b"\x89PNG")


def test_more_parameters_have_no_picture():
    def f(x):
        return tf.reduce_sum(x**2)

    result = minimized(f, (1.0, 2.0, 3.0))
    with pytest.raises(InvalidArgumentError, match=r"(?s)3 parameters.*result.plot"):
        plot_path(f, result)


def test_another_function_than_that_of_the_result_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"(?s)take the parameters.*try: "):
        plot_path(lambda x: x**2, minimized())  # it returns two numbers


def test_a_path_without_a_finite_point_is_refused():
    result = minimized(bowl, (np.nan, 1.0))
    with pytest.raises(InvalidArgumentError, match=r"(?s)finite.*tfgrad.explain"):
        plot_path(bowl, result)


def test_what_is_no_result_is_refused():
    said = r"(?s)f=the function `bowl`, result=None.*try: plot_path"
    with pytest.raises(InvalidArgumentError, match=said):
        plot_path(bowl, None)
    with pytest.raises(InvalidArgumentError, match="f=None"):
        plot_path(None, minimized())


def test_coordinates_are_named_as_one_types_them():
    nest = {"a": 1.0, "w": np.zeros((1, 2))}

    assert coordinate_names(nest) == ["x['a']", "x['w'][0, 0]", "x['w'][0, 1]"]


# --- plot_runs ------------------------------------------------------------------------


@pytest.fixture
def logs(tmp_path):
    for name in ("a", "b"):
        with Run(tmp_path / name) as run:
            run.log_history({"loss": [2.0, 1.0], "x": [0.0, 1.0]}, range(2))
            run.log(1, seconds=3.0)
    with Run(tmp_path / "b", resume_from=2) as run:
        run.log_history({"rare": [1.0, 2.0]}, [2, 3])
    return tmp_path


def test_each_run_is_a_line_in_the_chart_of_each_tag(logs):
    picture = plot_runs(logs)

    titles = [axes.get_title() for axes in picture.axes if axes.lines]
    assert titles == ["loss", "x", "rare"]  # a single point is no curve
    for axes in picture.axes[:2]:
        assert [line.get_label() for line in axes.lines] == ["a", "b"]
    np.testing.assert_array_equal(picture.axes[0].lines[0].get_ydata(), [2.0, 1.0])
    assert picture._repr_png_().startswith(b"\x89PNG")


def test_a_run_without_the_tag_is_not_in_the_legend(logs):
    (legend,) = plot_runs(logs, "rare").legends

    assert [text.get_text() for text in legend.get_texts()] == ["b"]


def test_a_name_that_begins_with_an_underscore_is_in_the_legend(logs):
    (logs / "b").rename(logs / "_b")
    (legend,) = plot_runs(logs).legends

    assert [text.get_text() for text in legend.get_texts()] == ["_b", "a"]


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1.0, 1e-4], "log"),
        ([1.0, 1e-4, 0.0], "log"),  # a loss that has arrived
        ([1.0, 0.1, 0.0], "linear"),
        ([1.0, 1e-4, -1.0], "linear"),
    ],
)
def test_values_of_many_orders_of_magnitude_are_drawn_in_logarithms(
    tmp_path, values, scale
):
    with Run(tmp_path) as run:
        run.log_history({"loss": values}, range(len(values)))

    assert plot_runs(tmp_path).axes[0].get_yscale() == scale


def test_tags_can_be_chosen(logs):
    assert [axes.get_title() for axes in plot_runs(logs, "x").axes] == ["x"]
    assert plot_runs(logs, ["x", "loss"]).axes[1].get_title() == "loss"
    with pytest.raises(InvalidArgumentError, match=r"(?s)'lost'.*one of 'loss', 'x'"):
        plot_runs(logs, "lost")


@pytest.mark.parametrize("tags", [3, [3], [None, "loss"]], ids=str)
def test_tags_that_are_none_are_refused(logs, tags):
    with pytest.raises(InvalidArgumentError, match=r"(?s)got: tags=.*try: tags="):
        plot_runs(logs, tags=tags)


def test_names_with_a_dollar_are_drawn_as_they_are(tmp_path):
    with Run(tmp_path / "a$^$") as run:
        run.log_history({"cost $_{ $": [2.0, 1.0]}, range(2))

    assert plot_runs(tmp_path)._repr_png_().startswith(b"\x89PNG")


def test_what_holds_no_curves_is_not_drawn(tmp_path):
    with pytest.raises(RunError, match="holds no event files"):
        plot_runs(tmp_path)
    Run(tmp_path).close()
    with pytest.raises(InvalidArgumentError, match="runs without any"):
        plot_runs(tmp_path)
