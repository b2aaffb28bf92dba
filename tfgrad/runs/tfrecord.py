"""Records of event files, without TensorFlow, whose import takes five seconds.

An event file is a sequence of TFRecords: the length of the content (8 bytes), the
checksum of the length (4), the content, the checksum of the content (4). A checksum is
a masked CRC-32C. Each is verified here before a number is believed, and a length before
any memory is asked for.
"""

from __future__ import annotations

import functools
import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from google.protobuf.message import DecodeError

from tfgrad.runs.tensorboard import require

LARGEST_RECORD = 2**28
"""Bytes. A longer one is damage: TensorBoard's pictures take a thousandth of it."""

_LENGTH = struct.Struct("<Q")
HEAD, _TAIL = 12, 4  # bytes around the content
_BLOCK = 2**20  # bytes that are read at a time
_TAIL_BLOCKS = (2**13, 2**15, 2**17, 2**19, 2**21)  # bytes of the end of a file
_FEW = 16  # records
LANE = 1024  # bytes of a record whose checksum is computed at once

Frames = np.ndarray[Any, Any]
"""Where the contents of records begin and end in a block, shape `[records, 2]`."""


def read_events(path: Path) -> Iterator[Any]:
    """Yield the events of a file up to the first that is damaged; warn if there is one.

    The warning names the file, and says how much of it cannot be read.
    """
    kept = lost = whole = 0
    try:
        file = path.open("rb")
    except OSError as error:
        _warn(f"{path} is left out: {error.strerror}.")
        return
    with file:
        size = os.fstat(file.fileno()).st_size  # a live run may append more
        for block, frames in _blocks(file):
            sound = _sums_agree(block, frames)
            for (start, stop), is_sound in zip(frames.tolist(), sound, strict=True):
                event = _parsed(block[start:stop]) if is_sound and not lost else None
                if event is None:
                    lost += 1
                    continue
                yield event
                kept += 1
                whole += HEAD + stop - start + _TAIL
    if whole < size:
        what = f"a damaged record and {lost - 1} after it" if lost else "a torn end"
        _warn(
            f"{path}: the last {size - whole} of {size} bytes cannot be read ({what}); "
            f"the {kept} records before are kept."
        )


def last_scalars(path: Path) -> dict[str, float]:
    """Return the last value of each curve that has a value near the end of a file.

    Of a large file, only the end is read: as little as has scalars in it, and at
    most two megabytes.
    """
    found: dict[str, float] = {}
    with path.open("rb") as file:
        size = file.seek(0, 2)
        for length in _TAIL_BLOCKS:
            start = max(0, size - length)
            file.seek(start)
            block = file.read()
            # A record begins where 8 bytes are followed by their checksum.
            most = _TAIL_BLOCKS[0] if start else 1
            places = np.arange(max(0, min(most, len(block) - HEAD)))
            heads = np.flatnonzero(_agree(block, places, _LENGTH.size))
            at = int(heads[0]) if len(heads) else len(block)
            for begin, end in _frames(block[at:]).tolist():
                event = _parsed(block[at + begin : at + end])
                for value in event.summary.value if event is not None else ():
                    if value.HasField("simple_value"):
                        found[value.tag] = value.simple_value
            if found or start == 0:
                break
    return found


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def unread(path: Path) -> tuple[int, bool]:
    """Return how many bytes follow the last whole record, and whether they are hostile.

    They are, if they declare a record of a length that would stop TensorBoard: a reader
    that believes it asks for all of that memory.
    """
    try:
        file = path.open("rb")
    except OSError:
        return 0, False
    with file:
        size = os.fstat(file.fileno()).st_size
        end = sum(int(frames[-1, 1]) + _TAIL for _, frames in _blocks(file))
        file.seek(end)
        head = file.read(HEAD)
    is_hostile = (
        len(head) == HEAD
        and _LENGTH.unpack_from(head)[0] > LARGEST_RECORD
        and bool(_heads_agree(head, np.array([[HEAD, HEAD]]))[0])
    )
    return max(0, size - end), is_hostile


def _blocks(file: BinaryIO) -> Iterator[tuple[bytes, Frames]]:
    """Yield blocks of whole records, up to the first length whose checksum is wrong."""
    at = 0
    while True:
        file.seek(at)
        block = file.read(_BLOCK)
        if len(block) < HEAD + _TAIL:
            return
        (length,) = _LENGTH.unpack_from(block)
        if length > LARGEST_RECORD:
            return
        block += file.read(max(0, HEAD + length + _TAIL - len(block)))
        frames = _frames(block)
        count = len(frames)
        frames = frames[np.logical_and.accumulate(_heads_agree(block, frames))]
        if not len(frames):
            return
        yield block, frames
        if len(frames) < count:
            return
        at += int(frames[-1, 1]) + _TAIL


def _frames(block: bytes) -> Frames:
    frames, at = [], 0
    while at + HEAD + _TAIL <= len(block):
        start = at + HEAD
        stop = start + _LENGTH.unpack_from(block, at)[0]
        if stop + _TAIL > len(block):
            break
        frames.append((start, stop))
        at = stop + _TAIL
    return np.array(frames, np.int64).reshape(-1, 2)


def _parsed(content: bytes) -> Any:
    try:
        return _event_type().FromString(content)
    except DecodeError:
        return None


@functools.cache
def _event_type() -> Any:
    return require("compat.proto.event_pb2").Event


# --- checksums ------------------------------------------------------------------------


def _heads_agree(block: bytes, frames: Frames) -> np.ndarray[Any, Any]:
    """Return whether the checksum of each length is right, shape `[records]`."""
    return _agree(block, frames[:, 0] - HEAD, _LENGTH.size)


def _sums_agree(block: bytes, frames: Frames) -> np.ndarray[Any, Any]:
    """Return whether the checksum of each content is right, shape `[records]`."""
    lengths = frames[:, 1] - frames[:, 0]
    agree = np.full(len(frames), True)  # of under 4 bytes, which hold no number
    for length in set(lengths[lengths >= 4].tolist()):
        rows = lengths == length
        agree[rows] = _agree(block, frames[rows, 0], length)
    return agree


def _agree(block: bytes, starts: Any, length: int) -> np.ndarray[Any, Any]:
    """Return whether the 4 bytes after contents of one length are their checksums."""
    data = np.frombuffer(block, np.uint8)
    if 0 < len(starts) < _FEW:  # may be long: an index takes 8 bytes for each byte
        rows = np.stack([data[start : start + length + _TAIL] for start in starts])
    else:
        rows = data[starts[:, None] + np.arange(length + _TAIL)]
    stored = np.ascontiguousarray(rows[:, length:]).view("<u4")[:, 0]
    return np.asarray(masked(crc32c(rows[:, :length])) == stored)


def framed(content: bytes) -> bytes:
    """Return the record of a content of at least 4 bytes."""
    length = _LENGTH.pack(len(content))
    parts = []
    for part in (length, content):
        row = np.frombuffer(part, np.uint8)[None]
        parts += [part, masked(crc32c(row)).tobytes()]
    return b"".join(parts)


def masked(crc: Any) -> Any:
    """Return checksums as they are stored; of an int, the last 32 bits are."""
    return (crc >> 15 | crc << 17) + 0xA282EAD8


def crc32c(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the CRC-32C (RFC 3720, appendix B.4) of each row, at least 4 bytes long.

    The sum is linear over GF(2): it is the XOR of what each byte adds by its distance
    from the end, after the first four bytes are inverted. The state after one lane
    counts as four more bytes, XORed into the first four of the next.
    """
    count, length = rows.shape
    width = min(length, LANE)
    lanes = np.zeros([count, -(-length // width) * width], np.uint8)
    lanes[:, -length:] = rows  # zeros in front add nothing
    first = lanes.shape[1] - length
    lanes[:, first : first + 4] ^= 0xFF
    bits, distances = table(), np.arange(width)[::-1]
    state = np.zeros(count, "<u4")
    for start in range(0, lanes.shape[1], width):
        lane = lanes[:, start : start + width]
        lane[:, :4] ^= state.view(np.uint8).reshape(count, 4)
        state = np.bitwise_xor.reduce(bits[distances, lane], axis=1)
    return ~state


@functools.cache
def table() -> np.ndarray[Any, Any]:
    """Return what a byte adds to a CRC-32C, by its distance from the end and value."""
    row: np.ndarray[Any, Any] = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        row = row >> 1 ^ np.where(row & 1, np.uint32(0x82F63B78), np.uint32(0))
    rows = [row]
    while len(rows) < LANE:
        rows.append(rows[-1] >> 8 ^ row[rows[-1] & 0xFF])
    return np.stack(rows).astype("<u4")
