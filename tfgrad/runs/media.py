"""Pictures, distributions and charts in the forms that TensorBoard stores them."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad import nested
from tfgrad.errors import InvalidArgumentError
from tfgrad.runs.tensorboard import require
from tfgrad.runs.values import as_array, check_tag, real_array

LAYOUT = "custom_scalars__config__"
"""Where the Custom Scalars plugin looks for the charts of a run."""

BUCKETS = 30
"""How many bars a histogram has: the default of `tf.summary.histogram`."""

_LARGEST = float(np.finfo(np.float32).max)
_ROUNDING = 1e-3  # how far a float picture may leave 0..1: less than half a grey level


def to_buckets(values: Any, tag: str) -> np.ndarray[Any, Any]:
    """Return the histogram of `values`: rows (left, right, count), float64.

    Values that are not finite are left out: with one NaN, every bar would be NaN.
    Numbers beyond float32 count as the largest float32. Without values, the buckets are
    empty.
    """
    numbers = real_array(values)
    if numbers is None:
        raise InvalidArgumentError(
            "A histogram is of real numbers, in any shape.",
            got=f"{tag!r} is {nested.describe(values)}",
            hint="an array or a tensor; one histogram for each leaf of a nest",
        )
    finite = numbers[np.isfinite(numbers)].clip(-_LARGEST, _LARGEST)
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    if high - low <= BUCKETS * np.spacing(max(abs(low), abs(high))):
        # The values are equal, or nearly so: bars must be wide enough to be seen.
        margin = 0.5 * max(1.0, abs(low))
        low, high = low - margin, high + margin
    counts, edges = np.histogram(finite, bins=BUCKETS, range=(low, high))
    return np.stack([edges[:-1], edges[1:], counts], axis=1)


def to_pngs(image: Any, tag: str) -> list[bytes]:
    """Return [width, height, PNG, PNG ...] of arrays of pixels or of a figure."""
    if hasattr(image, "savefig"):
        buffer = io.BytesIO()
        image.savefig(buffer, format="png", dpi=100)
        pngs = [buffer.getvalue()]
    else:
        pngs = [tf.io.encode_png(pixels).numpy() for pixels in _pixels(image, tag)]
    width, height = struct.unpack(">II", pngs[0][16:24])  # in PNG's first chunk
    return [str(width).encode(), str(height).encode(), *pngs]


def to_layout(charts: Any) -> bytes:
    """Return the serialized `Layout` of {category: {chart: [tags]}}."""
    layout = require("plugins.custom_scalar.layout_pb2").Layout()
    for category, its_charts in _checked(charts, Mapping, "charts").items():
        check_tag(category)
        group = layout.category.add(title=category)
        for chart, tags in _checked(its_charts, Mapping, repr(category)).items():
            check_tag(chart)
            for tag in _checked(tags, Sequence, repr(chart)):
                check_tag(tag)
            lines = [f"^{re.escape(tag)}$" for tag in tags]
            group.chart.add(title=chart, multiline={"tag": lines})
    return bytes(layout.SerializeToString())


def _pixels(image: Any, tag: str) -> np.ndarray[Any, Any]:
    """Return `image` as uint8 of shape `[images, height, width, channels]`."""
    found = real_array(image)
    array = np.zeros([]) if found is None else found
    array = array[:, :, None] if array.ndim == 2 else array
    array = array[None] if array.ndim == 3 else array
    is_picture = array.ndim == 4 and array.shape[3] in (1, 3, 4) and array.size
    dtype = as_array(image).dtype if is_picture else None
    if dtype is None or not (dtype in (np.uint8, bool) or dtype.kind in "fV"):
        raise InvalidArgumentError(
            "An image is a figure, or an array of floats in 0..1 or of uint8.",
            got=f"{tag!r} is {nested.describe(image)}",
            hint="shape (height, width), (height, width, 1, 3 or 4), or a batch of it",
        )
    if dtype == np.uint8:
        return array.astype(np.uint8)
    if not (array.min() >= -_ROUNDING and array.max() <= 1 + _ROUNDING):
        raise InvalidArgumentError(
            "The floats of an image are from 0 to 1.",
            got=f"{tag!r} has values from {array.min():.4g} to {array.max():.4g}",
            hint="(a - a.min()) / (a.max() - a.min()), or a.astype(numpy.uint8)",
        )
    return np.round(array.clip(0, 1) * 255).astype(np.uint8)


def _checked(value: Any, kind: Any, name: str) -> Any:
    if isinstance(value, kind) and not isinstance(value, str) and value:
        return value
    raise InvalidArgumentError(
        "A layout maps categories to charts, and charts to their tags.",
        got=f"{name} is {value!r}",
        hint='{"convergence": {"loss": ["training/loss", "validation/loss"]}}',
    )
