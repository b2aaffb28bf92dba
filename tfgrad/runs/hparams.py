"""Hyper-parameters, as TensorBoard's HParams tab reads them.

The plugin is imported on use: it costs a tenth of a second, and most runs have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tfgrad.runs.values import check_mapping, check_tag

FAILURES = ("failure", "interrupted", "nonfinite")
"""Statuses of runs that did not come to their end; the tab knows two kinds only."""


def checked(hparams: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Return `hparams` as the tab can hold them: what is no number is its `str`."""
    check_mapping(hparams, "hparams")
    for name in hparams:
        check_tag(name)
    return {name: _plain(value) for name, value in hparams.items()}


def start(hparams: Mapping[str, bool | float | str], session: str) -> bytes:
    """Return the serialized `Summary` that opens `session` with `hparams`."""
    from tensorboard.plugins.hparams import api

    summary = api.hparams_pb(dict(hparams), trial_id=session)
    return bytes(summary.SerializeToString())


def end(status: str) -> bytes:
    """Return the serialized `Summary` that ends the session."""
    from tensorboard.plugins.hparams import api_pb2, summary

    failed = status in FAILURES
    shown = api_pb2.STATUS_FAILURE if failed else api_pb2.STATUS_SUCCESS
    return bytes(summary.session_end_pb(shown).SerializeToString())


def _plain(value: Any) -> bool | float | str:
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, bool | int | float | str) else str(value)
