"""Frames: how bytes are put in an append-only file so that what is whole can be told from what is not.

A frame is a mark, the length of its body, the body's CRC-32, and the body. A process that dies in the middle of a
write leaves a piece of a frame at the end; a disk can spoil any of them. A reader passes over such a stretch and
goes on at the next whole frame.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from struct import Struct
from zlib import crc32

MARK = b"\xf1TV\n"
HEAD = Struct("!4sII")
# Bytes that are read at a time.
_PIECE = 1 << 18


def frame(body: bytes) -> bytes:
    """Return ``body``, which must not be empty, as a frame."""
    return HEAD.pack(MARK, len(body), crc32(body)) + body


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of ``data``; where `OSError` is raised, a piece of it may be written."""
    while data:
        # Less than all if the disk became full in the middle, or a signal came; the rest says which.
        data = data[os.write(descriptor, data) :]


def read_frames(descriptor: int, start: int, end: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Return the place of each frame between two places of a file, where the next begins, and its body.

    None for a body stands for bytes that are no whole frame; of these there may be several in a row.
    """
    window = _Window(descriptor, end)
    at = start
    while at < end:
        head = window.read(at, HEAD.size)
        if len(head) == HEAD.size and head.startswith(MARK):
            _, length, checksum = HEAD.unpack(head)
            following = at + HEAD.size + length
            if length and following <= end:
                body = window.read(at + HEAD.size, length)
                if crc32(body) == checksum and len(body) == length:
                    yield at, following, body
                    at = following
                    continue
        following = window.find(MARK, at + 1)
        yield at, following, None
        at = following


def begins_frame(descriptor: int, start: int, end: int) -> bool:
    """Whether the bytes between two places are the beginning of a frame that goes on beyond them."""
    head = os.pread(descriptor, min(HEAD.size, end - start), start)
    if len(head) < HEAD.size:
        return MARK.startswith(head[: len(MARK)])
    return head.startswith(MARK) and start + HEAD.size + HEAD.unpack(head)[1] > end


class _Window:
    """Part of a file in memory."""

    def __init__(self, descriptor: int, end: int) -> None:
        self._descriptor = descriptor
        self._end = end
        self._base = 0
        self._data = b""

    def read(self, at: int, size: int) -> bytes:
        """Return ``size`` bytes at a place, or fewer where the file ends."""
        begin = at - self._base
        if begin < 0 or begin + size > len(self._data):
            self._data = os.pread(self._descriptor, min(max(size, _PIECE), self._end - at), at)
            self._base, begin = at, 0
        return self._data[begin : begin + size]

    def find(self, mark: bytes, at: int) -> int:
        """Return the first place of ``mark`` from a place on, or the end."""
        while at < self._end:
            piece = os.pread(self._descriptor, min(_PIECE, self._end - at), at)
            found = piece.find(mark)
            if found >= 0:
                return at + found
            if len(piece) < len(mark):
                break
            at += len(piece) - len(mark) + 1
        return self._end
