# SPDX-License-Identifier: Apache-2.0
"""Finding strategies through entry points: lazy, strict, and unharmed by a plug-in that is broken."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from textwrap import dedent
from typing import Literal

import pytest

from optimum_blockprune.errors import ConfigurationError, UnknownStrategyError
from optimum_blockprune.registry import GROUP, available_strategies, build_options, get_strategy
from optimum_blockprune.strategies.base import PruningStrategy


STRATEGY = '''
from optimum_blockprune.strategies.base import PruningStrategy

class Mine(PruningStrategy):
    """Removes what I like.

    And more."""

    name = "mine"

    def select(self, context):
        return context.plan(context.removable[: context.num_remove])
'''


@pytest.fixture
def install(tmp_path, monkeypatch) -> Callable[..., None]:
    """Returns a function that puts a distribution with one module and one entry point on the path."""

    def install_distribution(distribution: str, source: str, *, name: str = "mine", target: str = "Mine") -> None:
        module = f"module_of_{distribution}"
        info = tmp_path / f"{distribution}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {module}:{target}\n")
        (tmp_path / f"{module}.py").write_text(dedent(source))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return install_distribution


def test_every_built_in_strategy_is_available() -> None:
    built_in = {entry.name for entry in entry_points(group=GROUP) if entry.dist.name == "optimum-blockprune"}
    width = {"bip", "functional_network", "magnitude"}
    assert built_in >= {"angular", "manual", "mi_prun", "random", "search", "shortgpt", "sleb", *width}
    strategies = available_strategies()
    assert list(strategies) == sorted(strategies)
    for name in built_in:
        info = strategies[name]
        unit = "width" if name in width else "block"
        assert (info.name, info.available, info.error, info.unit) == (name, True, None, unit)
        assert info.summary


def test_a_plug_in_is_found(install) -> None:
    install("goodplug", STRATEGY)
    assert get_strategy("mine").name == "mine"
    info = available_strategies()["mine"]
    assert (info.distribution, info.version, info.unit) == ("goodplug", "1.5", "block")
    assert info.summary == "Removes what I like."


def test_only_the_requested_strategy_is_imported(install) -> None:
    install("lazyplug", STRATEGY)
    install("boomplug", "raise RuntimeError('boom')", name="boom")
    get_strategy("mine")
    assert "module_of_boomplug" not in sys.modules


def test_an_unknown_name_suggests_near_ones() -> None:
    with pytest.raises(UnknownStrategyError, match="There is no strategy 'slep'. Did you mean 'sleb'.*Available: "):
        get_strategy("slep")


@pytest.mark.parametrize("source", ["raise ImportError('no such thing')", "1 / 0", "import surely_not_installed"])
def test_a_broken_plug_in_is_listed_with_its_error(install, source) -> None:
    install("brokenplug", source)
    info = available_strategies()["mine"]
    assert (info.available, info.unit, info.summary) == (False, None, None)
    with pytest.raises(UnknownStrategyError, match="'mine' of brokenplug 1.5 .* cannot be imported: ") as caught:
        get_strategy("mine")
    assert str(caught.value) == info.error
    assert type(caught.value.__cause__).__name__ in info.error


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("Mine = 3", "3 is not a subclass of PruningStrategy"),
        ("class Mine: name = 'mine'", "is not a subclass of PruningStrategy"),
        (STRATEGY.replace('"mine"', '"other"'), "Mine.name is 'other', its entry point is called 'mine'"),
        (STRATEGY.replace('name = "mine"', ""), "Mine.name is None"),
        (STRATEGY.replace('name = "mine"', 'name = "mine"\n    Options = dict'), "Mine.Options is not a dataclass"),
        (STRATEGY.replace("select", "choose"), "Mine does not implement select"),
    ],
)
def test_a_class_that_is_no_strategy_is_refused(install, source, fault) -> None:
    install("oddplug", source)
    with pytest.raises(UnknownStrategyError, match=f"oddplug 1.5 .* is not usable: .*{fault}"):
        get_strategy("mine")
    assert not available_strategies()["mine"].available


@pytest.mark.parametrize("name", ["mine", "random"])
def test_a_name_claimed_twice_belongs_to_nobody(install, name) -> None:
    install("firstplug", STRATEGY.replace('"mine"', f'"{name}"'), name=name)
    if name == "mine":
        install("secondplug", STRATEGY)
    other = "secondplug" if name == "mine" else "optimum-blockprune"
    with pytest.raises(UnknownStrategyError, match=f"'{name}' is claimed by firstplug .* and {other} "):
        get_strategy(name)
    strategies = available_strategies()
    assert {"firstplug", other} == set(strategies[name].distribution.split(", "))
    assert not strategies[name].available
    assert strategies["sleb"].available


@dataclass(frozen=True)
class Options:
    """One field of each kind that the command line can spell."""

    count: int = 1
    ratio: float = 0.5
    fast: bool = False
    title: str = "a"
    limit: int | None = None
    label: str | None = None
    either: float | int | str = 0
    mode: Literal["mean", "max"] = "mean"
    pair: tuple[int, int] = (1, 2)

    def __post_init__(self) -> None:
        if self.count == 99:
            raise ConfigurationError("count=99 is special")
        if self.count == 98:
            raise ValueError("count is 98")


class Typed(PruningStrategy):
    """A strategy with options."""

    name = "typed"
    Options = Options

    def select(self, context) -> None:
        """Chooses nothing."""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Options()),
        ({"count": "7"}, Options(count=7)),
        ({"ratio": "1e-3"}, Options(ratio=1e-3)),
        ({"fast": "true"}, Options(fast=True)),
        ({"fast": "No"}, Options(fast=False)),
        ({"fast": True}, Options(fast=True)),
        ({"title": "true"}, Options(title="true")),
        ({"limit": "none"}, Options(limit=None)),
        ({"limit": "None"}, Options(limit=None)),
        ({"limit": "12"}, Options(limit=12)),
        ({"label": "12"}, Options(label="12")),
        ({"mode": "max"}, Options(mode="max")),
        ({"pair": (3, 4)}, Options(pair=(3, 4))),
    ],
)
def test_options_are_built(given, expected) -> None:
    assert build_options(Typed, given) == expected


@pytest.mark.parametrize(
    ("field", "given", "expected"),
    [
        ("ratio", 1, 1.0),
        ("ratio", "1", 1.0),
        ("either", "3", 3),
        ("either", "3.5", 3.5),
        ("either", "x", "x"),
        ("either", 3, 3),
    ],
)
def test_options_get_the_declared_type(field, given, expected) -> None:
    value = getattr(build_options(Typed, {field: given}), field)
    assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cuont": 1}, "Strategy 'typed' has no option 'cuont'. Did you mean 'count'"),
        ({"count": "x"}, "Option 'count' of strategy 'typed' must be a whole number, not 'x'"),
        ({"count": "1.5"}, "must be a whole number"),
        ({"count": 1.5}, "must be a whole number, not 1.5"),
        ({"count": True}, "must be a whole number, not True"),
        ({"count": None}, "must be a whole number, not None"),
        ({"ratio": "much"}, "must be a number, not 'much'"),
        ({"ratio": False}, "must be a number, not False"),
        ({"fast": "maybe"}, "must be true or false, not 'maybe'"),
        ({"fast": 1}, "must be true or false, not 1"),
        ({"title": 3}, "must be text, not 3"),
        ({"limit": "few"}, "must be a whole number or None, not 'few'"),
        ({"mode": "min"}, "must be 'mean' or 'max', not 'min'"),
        ({"count": 99}, "^count=99 is special$"),
        ({"count": 98}, "The options of strategy 'typed' do not fit: count is 98."),
    ],
)
def test_options_that_do_not_fit(given, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_options(Typed, given)


def test_a_missing_required_option() -> None:
    @dataclass(frozen=True)
    class Required:
        depth: int

    class Needy(Typed):
        """Needs an option."""

        Options = Required

    with pytest.raises(ConfigurationError, match="do not fit: .*'depth'"):
        build_options(Needy, {})
