# SPDX-License-Identifier: Apache-2.0
"""Processes that work together: sums, gifts, failures; really several of them, on the CPU."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from ranks import Outcome, Scenario, play

from optimum_blockprune.errors import ConfigurationError
from optimum_blockprune.team import SOLO, Team, alone, in_step


SCENARIOS = {
    "sums": Scenario("sums", size=3),
    "gifts": Scenario("gifts", size=3),
    "failures": Scenario("failures"),
    "lost": Scenario("lost", size=3),
}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    return play(SCENARIOS, tmp_path_factory.mktemp("team"))


def said(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """What each process said, in one object."""
    found = []
    for outcome in outcomes:
        lines: dict[str, Any] = {}
        for line in outcome.out.splitlines():
            lines |= json.loads(line)
        found.append(lines)
    return found


# Several


def test_sums_are_exact_and_the_same_everywhere_even_with_an_empty_share(played: dict[str, list[Outcome]]) -> None:
    first, *others = said(played["sums"])
    assert [outcome.code for outcome in played["sums"]] == [0, 0, 0]
    assert others == [first, first]
    matrix = torch.arange(6, dtype=torch.float64).view(2, 3).T
    assert first["matrix"] == ["torch.float64", [3, 2], (matrix + (matrix + 0.1)).tolist()]
    assert first["count"] == ["torch.int64", [], 2**61 + 2]
    assert first["nothing"] == ["torch.float64", [0, 2], []]
    assert first["whole"] == ["torch.int32", [2], [1, -2]]
    assert first["own"] == ["torch.float64", [1], [7.0]]


def test_the_first_gives_to_all_and_works_alone(played: dict[str, list[Outcome]]) -> None:
    found = said(played["gifts"])
    assert all(each["same"] and each["none"] is None and each["size"] == 3 for each in found)
    assert found[2]["names"] == ["half", "mask", "scalar", "empty"]
    assert [each["takes"] for each in found] == [
        [True, False, False, True],
        [False, True, False, False],
        [False, False, True, False],
    ]
    assert [each["by_first"] for each in found] == [[0, 1], None, None]


@pytest.mark.parametrize(
    "name, own, other",
    [
        (
            "strange",
            "ZeroDivisionError: by zero",
            "DistributedError: Process 2 of 2 failed: ZeroDivisionError: by zero",
        ),
        ("wrapped", "ConfigurationError: outer", "DistributedError: Process 2 of 2 failed: KeyError: 'inner'"),
        ("again", "ConfigurationError: second", "DistributedError: Process 2 of 2 failed: second"),
    ],
)
def test_a_failure_of_one_is_an_error_of_all(
    played: dict[str, list[Outcome]], name: str, own: str, other: str
) -> None:
    first, second = said(played["failures"])
    assert (first[name], second[name]) == (other, own)


def test_reasons_are_one_line_of_bounded_length(played: dict[str, list[Outcome]]) -> None:
    first, second = said(played["failures"])
    assert first["reason"].startswith("DistributedError: Process 2 of 2 failed: wrong 'thing' xxx")
    assert len(first["reason"]) < 1200 < len(second["reason"])


def test_a_failure_of_the_first_is_one_of_the_others(played: dict[str, list[Outcome]]) -> None:
    first, second = said(played["failures"])
    assert first["interrupted"] == "KeyboardInterrupt: "
    assert second["interrupted"] == "DistributedError: Process 1 of 2 failed: KeyboardInterrupt"
    assert first["by_first"] == "ConfigurationError: disk"
    assert second["by_first"] == "DistributedError: Process 1 of 2 failed: disk"


def test_what_fails_everywhere_keeps_its_own_words(played: dict[str, list[Outcome]]) -> None:
    assert [each["both"] for each in said(played["failures"])] == ["ConfigurationError: all of us"] * 2
    assert {each["dtype"] for each in said(played["failures"])} == {
        "TypeError: 'matrix' is float32; sums over processes are float64, int64, int32."
    }


def test_disagreements_are_errors_of_all(played: dict[str, list[Outcome]]) -> None:
    for each in said(played["failures"]):
        assert each["same"] == "none"
        assert "disagree on 'matrix': process 2 has ['float64', 3], another one ['float64', 2]" in each["shapes"]
        assert "out of step: 1 is at 'from_first', 2 is at 'summed'" in each["steps"]
        assert "the text of process 1 is " + 40 * "a" + "0, of process 2 " + 40 * "a" + "1. Give" in each["differs"]


def test_processes_that_failed_can_go_on_together(played: dict[str, list[Outcome]]) -> None:
    assert [each["alive"] for each in said(played["failures"])] == [1, 1]


def test_a_killed_process_is_an_error_of_the_others(played: dict[str, list[Outcome]]) -> None:
    assert [outcome.code for outcome in played["lost"]] == [0, 0, -9]
    for number, each in enumerate(said(played["lost"])[:2], start=1):
        assert each["error"].startswith(f"DistributedError: Process {number} of 3 lost the connection to the others")


# One alone


def test_without_a_group_a_process_is_alone() -> None:
    assert Team.current() is SOLO
    assert SOLO.is_first and SOLO.takes(0) and SOLO.takes(17)
    with alone():
        assert Team.current() is SOLO


def test_alone_nothing_is_changed() -> None:
    share = {"sum": torch.tensor([1.5], dtype=torch.float64), "count": torch.tensor(3)}
    assert SOLO.summed(share) == share
    assert SOLO.from_first(lambda: share) is share and SOLO.from_first(lambda: None) is None
    assert SOLO.by_first(lambda: 5) == 5
    SOLO.check_same("the text", "abc")
    with SOLO.together():
        pass


def test_alone_sums_are_checked_too() -> None:
    with pytest.raises(TypeError, match="'loss' is bfloat16; sums over processes are float64, int64, int32"):
        SOLO.summed({"loss": torch.zeros(1, dtype=torch.bfloat16)})


def test_alone_errors_pass_as_they_are() -> None:
    @in_step
    def fail() -> None:
        raise ConfigurationError("no")

    with pytest.raises(ConfigurationError, match="^no$"):
        fail()
    with pytest.raises(KeyboardInterrupt), SOLO.together():
        raise KeyboardInterrupt
