import pytest
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from tfgrad.errors import InvalidArgumentError
from tfgrad.runs.media import to_layout


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
