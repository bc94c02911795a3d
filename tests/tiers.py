# SPDX-License-Identifier: Apache-2.0
"""Which cases of a test run by default: each way of being different once. The others are slow tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def often(cases: Iterable[Any], kept: Callable[[Any], bool]) -> list[Any]:
    """Parameters for `parametrize`.

    Args:
        cases: All of them; a tuple holds the values of several parameters.
        kept: Whether a case runs by default.
    """
    cases = list(cases)
    assert any(kept(case) for case in cases)
    return [case if kept(case) else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
