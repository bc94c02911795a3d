# SPDX-License-Identifier: Apache-2.0
"""Lets a command that is told to end clean up first: its temporary folders go, what was measured stays.

Only commands use this: signals belong to the program, and a library leaves them alone.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def terminable() -> Iterator[None]:
    """Makes SIGTERM, which ends a process on the spot, raise `KeyboardInterrupt` as Ctrl-C does, until the body ends.

    Left as it is where somebody else handles it, outside the main thread, and in all of several processes but the
    first: they write nothing, and would not hear of it while they wait for one another.
    """
    alone = os.environ.get("RANK", "0") == "0"
    if threading.current_thread() is not threading.main_thread() or not alone:
        yield
        return
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
