import numpy as np
import pytest
import tensorflow as tf
from matplotlib.figure import Figure
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from tfgrad.errors import InvalidArgumentError
from tfgrad.runs.media import BUCKETS, to_buckets, to_layout, to_pngs


def test_buckets_are_those_of_numpy():
    values = np.random.default_rng(0).standard_normal((20, 50))
    counts, edges = np.histogram(values, bins=BUCKETS)

    buckets = to_buckets(values, "w")
    np.testing.assert_array_equal(buckets[:, 2], counts)
    np.testing.assert_allclose(buckets[:, 0], edges[:-1])
    np.testing.assert_allclose(buckets[:, 1], edges[1:])


def test_values_that_are_not_finite_are_left_out():
    values = [np.nan, 0.0, 1.0, np.inf, -np.inf]

    np.testing.assert_array_equal(to_buckets(values, "w"), to_buckets([0.0, 1.0], "w"))


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ([], 0),
        ([np.nan], 0),
        ([0.0], 1),
        ([1e20, 1e20], 2),
        ([1.0, np.nextafter(1.0, 2.0)], 2),
        ([-1e308, 1e308], 2),
        (tf.constant([1, 2], tf.bfloat16), 2),
        ([True, False, True], 3),
        (3, 1),
    ],
    ids=str,
)
def test_the_edges_of_a_histogram_are_finite_and_grow(values, count):
    buckets = to_buckets(values, "w")

    assert buckets.shape == (BUCKETS, 3)
    assert np.isfinite(buckets).all()
    assert (buckets[:, 0] < buckets[:, 1]).all()
    assert buckets[:, 2].sum() == count


@pytest.mark.parametrize("values", ["1", None, [1j], [[1], [2, 3]], object()])
def test_a_histogram_of_what_is_no_number_is_refused(values):
    with pytest.raises(InvalidArgumentError, match=r"(?s)'w' is .*try: an array"):
        to_buckets(values, "w")


def decoded(content):
    width, height, png = content
    pixels = tf.io.decode_png(png).numpy()
    assert pixels.shape[:2] == (int(height), int(width))
    return pixels


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 1), (3, 5, 3), (3, 5, 4)])
def test_pixels_come_back_as_they_were(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    np.testing.assert_array_equal(
        decoded(to_pngs(pixels, "i")), pixels.reshape(3, 5, -1)
    )
    np.testing.assert_array_equal(
        decoded(to_pngs(pixels / 255, "i")), pixels.reshape(3, 5, -1)
    )


def test_a_mask_and_a_tensor_are_pictures_too():
    assert decoded(to_pngs(np.eye(2, dtype=bool), "i")).ravel().tolist() == [
        255,
        0,
        0,
        255,
    ]
    assert decoded(to_pngs(tf.zeros([4, 2]), "i")).shape == (4, 2, 1)


def test_a_batch_is_a_picture_each():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 3), np.uint8)
    width, height, *pngs = to_pngs(pixels, "i")

    assert (width, height) == (b"5", b"3")
    np.testing.assert_array_equal([tf.io.decode_png(png) for png in pngs], pixels)


def test_a_figure_is_drawn():
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])

    assert decoded(to_pngs(figure, "i")).shape == (100, 200, 4)


@pytest.mark.parametrize(
    "image",
    [
        "cat.png",
        None,
        3.0,
        np.zeros(3),
        np.zeros((2, 2, 2)),
        np.zeros((1, 1, 2, 2, 3)),
        np.zeros((0, 3)),
        np.zeros((2, 2), int),
        np.zeros((2, 2), complex),
    ],
)
def test_what_is_no_picture_is_refused(image):
    with pytest.raises(InvalidArgumentError, match=r"(?s)'i' is .*try: shape \(height"):
        to_pngs(image, "i")


@pytest.mark.parametrize("value", [2.0, -0.5, np.nan, np.inf])
def test_floats_beyond_zero_to_one_are_refused(value):
    with pytest.raises(InvalidArgumentError, match=r"(?s)values from .*numpy.uint8"):
        to_pngs(np.array([[0.0, value]]), "i")


# --- charts ---------------------------------------------------------------------------


def test_a_layout_names_each_tag_exactly():
    layout = Layout.FromString(to_layout({"fit": {"loss": ["a/b", "x[0]"]}}))

    (category,) = layout.category
    (chart,) = category.chart
    assert (category.title, chart.title) == ("fit", "loss")
    assert list(chart.multiline.tag) == ["^a/b$", r"^x\[0\]$"]


@pytest.mark.parametrize(
    "charts",
    [
        None,
        {},
        ["loss"],
        {"fit": "loss"},
        {"fit": {"loss": "loss"}},
        {"fit": {"loss": []}},
        {"fit": {"loss": [3]}},
        {"": {"loss": ["loss"]}},
    ],
)
def test_what_is_no_layout_is_refused(charts):
    with pytest.raises(InvalidArgumentError, match="try: "):
        to_layout(charts)
