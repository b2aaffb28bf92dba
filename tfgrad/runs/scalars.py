"""Records of scalars, framed many at once.

All events of the same tags, with steps of as many bytes, have the same form: they
differ in the bytes of their numbers alone. NumPy fills in these bytes, and adds to each
checksum what they change of it, a column at a time. A protocol buffer for each event
takes fourteen times as long, in which no other thread can run Python.
"""

from __future__ import annotations

import functools
import itertools
import operator
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.runs.tfrecord import HEAD, LANE, crc32c, framed, masked, table

_SUM = struct.Struct("<I")
_WIDER = np.array([2 ** (7 * count) for count in range(1, 9)], np.int64)
"""The numbers from which on a varint takes another byte: there are 7 bits in each."""


class Records:
    """The records of events that hold a number for each of some tags.

    Args:
        tags: The tags.
        width: How many bytes a step takes.

    References:
        tensorflow/core/util/event.proto and summary.proto: `wall_time` is field 1 of an
        event, `step` field 2, `summary` field 5; a number is the end of its value.
        protobuf.dev/programming-guides/encoding: varints.
    """

    def __init__(self, tags: Sequence[str], width: int) -> None:
        self._event = tf.compat.v1.Event(wall_time=1.0, step=2 ** (7 * width) - 1)
        add = self._event.summary.value.add
        self._values = [add(tag=tag, simple_value=0.0) for tag in tags]
        alone = [tf.compat.v1.Summary(value=[value]) for value in self._values]
        sizes = [summary.ByteSize() for summary in alone]
        content = np.frombuffer(self._event.SerializeToString(), np.uint8).copy()
        self._length = len(content)
        ends = self._length - sum(sizes) + np.cumsum(sizes)
        starts = zip([1, 10, *(ends - 4)], [8, width, *[4] * len(tags)], strict=True)
        places = np.concatenate([np.arange(a, a + count) for a, count in starts])
        content[places] = 0
        self._blank, self._places = framed(content.tobytes()), HEAD + places
        self._given_in, self._width = operator.itemgetter(*places), width
        self._sum_of_blank = int(crc32c(content[None])[0])
        self._distances: list[int] | None = None
        if self._length <= LANE:
            self._distances = (self._length - 1 - places).tolist()

    def rows(self, steps: Any, wall_times: Any, columns: Sequence[Any]) -> bytes:
        """Return the records of some steps; a column is the numbers of a tag.

        Numbers become float32; one out of its range becomes an infinity.
        """
        with np.errstate(over="ignore"):
            numbers = np.stack([np.asarray(c, "<f4") for c in columns], axis=1)
        sevens = np.arange(self._width)
        more = np.where(sevens < self._width - 1, 0x80, 0)
        bits = steps[:, None] >> 7 * sevens & 0x7F | more
        parts = np.asarray(wall_times, "<f8")[:, None], bits.astype(np.uint8), numbers
        given = np.concatenate([part.view(np.uint8) for part in parts], axis=1)
        rows = np.tile(np.frombuffer(self._blank, np.uint8), (len(steps), 1))
        rows[:, self._places] = given
        if self._distances is not None:
            sums = np.full(len(steps), self._sum_of_blank, np.uint32)
            for distance, column in zip(self._distances, given.T, strict=True):
                sums ^= table()[distance][column]
        else:
            sums = crc32c(rows[:, HEAD:-4])
        rows[:, -4:] = masked(sums)[:, None].view(np.uint8)
        return rows.tobytes()

    def row(self, step: int, wall_time: float, numbers: Sequence[float]) -> bytes:
        """Return the record of one step: the same as of `rows`, in less time."""
        event, whole = self._event, self._sum_of_blank
        event.step = step
        event.wall_time = wall_time
        for value, number in zip(self._values, numbers):  # noqa: B905 - strict: +20 %
            value.simple_value = number
        content = event.SerializeToString()
        if self._distances is None or len(content) != self._length:  # no zero is there
            return framed(content)
        given = self._given_in(content)
        for distance, byte in zip(self._distances, given):  # noqa: B905
            whole ^= _listed(distance)[byte]
        return self._blank[:HEAD] + content + _SUM.pack(masked(whole) & 0xFFFFFFFF)


@functools.cache
def _listed(distance: int) -> list[int]:
    found: list[int] = table()[distance].tolist()
    return found


def widths(steps: Any) -> list[tuple[slice, int]]:
    """Return the parts of steps that grow, and of how many bytes a step there is."""
    ends = [0, *np.searchsorted(steps, _WIDER).tolist(), len(steps)]
    pairs = enumerate(itertools.pairwise(ends), start=1)
    return [(slice(a, b), width) for width, (a, b) in pairs if a < b]
