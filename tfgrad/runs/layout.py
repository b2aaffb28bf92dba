"""Charts of several curves, for TensorBoard's Custom Scalars tab."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tfgrad.errors import InvalidArgumentError
from tfgrad.runs.values import check_tag

TAG = "custom_scalars__config__"
"""Where the plugin looks for the layout of a run."""


def to_layout(charts: Any) -> bytes:
    """Return the serialized `Layout` of {category: {chart: [tags]}}."""
    # On use: it costs a tenth of a second, and most runs have none.
    from tensorboard.plugins.custom_scalar import layout_pb2

    layout = layout_pb2.Layout()
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


def _checked(value: Any, kind: Any, name: str) -> Any:
    if isinstance(value, kind) and not isinstance(value, str) and value:
        return value
    raise InvalidArgumentError(
        "A layout maps categories to charts, and charts to their tags.",
        got=f"{name} is {value!r}",
        hint='{"convergence": {"loss": ["training/loss", "validation/loss"]}}',
    )
