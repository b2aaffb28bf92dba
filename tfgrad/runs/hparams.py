"""Hyper-parameters, as TensorBoard's HParams tab reads them.

The plugin is imported on use: it costs a tenth of a second, and most runs have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad import nested
from tfgrad.runs.values import as_array, check_mapping, check_tag, to_text

_LARGEST_INTEGER = 2**53
"""Beyond it the tab, which has only float64, would show another number."""

FAILURES = ("failure", "interrupted", "nonfinite")
"""Statuses of runs that did not come to their end; the tab knows two kinds only."""


def checked(hparams: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Return `hparams` as the tab can hold them: what is no number is its `str`."""
    check_mapping(hparams, "hparams")
    for name in hparams:
        check_tag(name)
    return {name: _plain(value) for name, value in hparams.items()}


def start(hparams: Mapping[str, bool | float | str], directory: Path) -> bytes:
    """Return the serialized `Summary` that opens the run in `directory`."""
    from tensorboard.plugins.hparams import api

    # What tells runs apart comes first: the tab has room for some twenty letters.
    place = directory.parent
    name = f"{place.name}/{directory.name} in {place.parent}"
    summary = api.hparams_pb(dict(hparams), trial_id=to_text(name))
    return bytes(summary.SerializeToString())


def end(status: str) -> bytes:
    """Return the serialized `Summary` that ends the session."""
    from tensorboard.plugins.hparams import api_pb2, summary

    failed = status in FAILURES
    shown = api_pb2.STATUS_FAILURE if failed else api_pb2.STATUS_SUCCESS
    return bytes(summary.session_end_pb(shown).SerializeToString())


def _plain(value: Any) -> bool | float | str:
    if isinstance(value, np.generic | np.ndarray | tf.Tensor) or nested.is_variable(
        value
    ):
        array = as_array(value)
        value = array.item() if array.ndim == 0 else value
    is_exact = not isinstance(value, int) or abs(value) <= _LARGEST_INTEGER
    if isinstance(value, bool | int | float) and is_exact:
        return value
    return to_text(str(value))
