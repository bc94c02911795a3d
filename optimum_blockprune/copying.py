# SPDX-License-Identifier: Apache-2.0
"""Appends bytes of one file to another without taking them through this process, where the system can (Linux)."""

from __future__ import annotations

import os
from typing import BinaryIO


# Copied at a time, so that a signal need not wait long.
_PIECE_BYTES = 16 * 2**20
# The system copies whole pages; where source and target lie differently in theirs, reading and writing is faster.
PAGE_BYTES = 4096


def append_range(source: BinaryIO, target: BinaryIO, start: int, count: int) -> int:
    """Appends bytes `start` to `start + count` of `source`, as many as the system copies by itself.

    Args:
        source: A file that is open for reading; its position does not change.
        target: A file that is open for writing, at its end.
        start: The first byte.
        count: How many bytes.

    Returns:
        How many it were, from the first on. The rest, which may be all, is for the caller to read and write; an error
        of the disk then comes up again.
    """
    done = 0
    target.flush()
    if not hasattr(os, "copy_file_range") or (start - target.tell()) % PAGE_BYTES:
        return done
    while done < count:
        piece = min(count - done, _PIECE_BYTES)
        try:
            copied = os.copy_file_range(source.fileno(), target.fileno(), piece, start + done)
        except OSError:  # not between these file systems, or not in this container
            break
        if not copied:  # the source has become shorter
            break
        done += copied
    return done
