# SPDX-License-Identifier: Apache-2.0
"""SIGTERM is heard like Ctrl-C while a command runs, and only where that is the command's business."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from optimum_blockprune.interrupts import terminable


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_sigterm_is_heard_like_ctrl_c_until_the_body_ends() -> None:
    with pytest.raises(KeyboardInterrupt), terminable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_of_somebody_else_stays() -> None:
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    with terminable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [1]


@pytest.mark.parametrize(("rank", "heard"), [("0", True), ("1", False)])
def test_of_several_processes_the_first_one_only(rank: str, heard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    with terminable():
        assert (signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL) == heard


def test_other_threads_leave_signals_alone() -> None:
    """Python refuses to change them there."""
    seen = []

    def work() -> None:
        with terminable():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]
