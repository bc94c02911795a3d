# SPDX-License-Identifier: Apache-2.0
"""Finds strategies by name, built-in and third-party through the same door: entry points.

Nothing is imported before somebody asks for it by name (or for the whole list), and one broken plug-in harms nobody
else: it is listed with its error, and only asking for it fails. A name that two distributions claim belongs to none.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import ConfigurationError, UnknownStrategyError, nearest


if TYPE_CHECKING:
    from .strategies.base import PruningStrategy

GROUP = "optimum_blockprune.strategies"


@dataclass(frozen=True)
class StrategyInfo:
    """One installed strategy, usable or not.

    Attributes:
        name: The entry-point name.
        distribution: The distribution that brings it; all of them if several claim the name.
        version: Version of that distribution.
        available: Whether it can be used.
        unit: What it removes; `None` if it is not available.
        summary: First line of its docstring.
        error: Why it is not available.
    """

    name: str
    distribution: str
    version: str
    available: bool
    unit: str | None = None
    summary: str | None = None
    error: str | None = None


def available_strategies() -> dict[str, StrategyInfo]:
    """Imports every installed strategy and describes it, by name; one that cannot be used carries its error."""
    return {name: _describe(name, entries) for name, entries in sorted(_installed().items())}


def get_strategy(name: str) -> type[PruningStrategy]:
    """Imports the strategy `name` and returns its class; no other strategy is imported.

    Raises:
        UnknownStrategyError: No installed strategy has this name, two have it, or it cannot be imported.
    """
    installed = _installed()
    if name not in installed:
        raise UnknownStrategyError(f"There is no strategy {name!r}.{nearest(str(name), installed)}")
    return _load(name, installed[name])


def build_options(strategy: type[PruningStrategy], options: Mapping[str, Any]) -> Any:
    """Builds the options object of a strategy from names and values; strings are read as the field's type.

    Args:
        strategy: The class whose `Options` dataclass says what is allowed.
        options: Values by option name, as written in Python or, as strings, on the command line.

    Raises:
        ConfigurationError: An option is unknown, missing or has a value that does not fit.
    """
    names = [option.name for option in fields(strategy.Options) if option.init]
    for name in options:
        if name not in names:
            raise ConfigurationError(f"Strategy {strategy.name!r} has no option {name!r}.{nearest(name, names)}")
    hints = get_type_hints(strategy.Options)
    values = {name: _fit_option(strategy.name, name, value, hints[name]) for name, value in options.items()}
    try:
        return strategy.Options(**values)
    except ConfigurationError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"The options of strategy {strategy.name!r} do not fit: {error}.") from error


def _installed() -> dict[str, list[EntryPoint]]:
    """Returns the entry points by name; a name with more than one belongs to several distributions."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        found.setdefault(entry.name, []).append(entry)
    return found


def _describe(name: str, entries: list[EntryPoint]) -> StrategyInfo:
    """Describes one name, importing what stands behind it."""
    origin = {
        "name": name,
        "distribution": ", ".join(entry.dist.name for entry in entries),
        "version": ", ".join(entry.dist.version for entry in entries),
    }
    try:
        strategy = _load(name, entries)
    except UnknownStrategyError as error:
        return StrategyInfo(**origin, available=False, error=str(error))
    # inspect.getdoc would show the base class's text for a strategy without one.
    lines = inspect.cleandoc(strategy.__doc__ or "").splitlines()
    return StrategyInfo(**origin, available=True, unit=strategy.unit, summary=lines[0] if lines else None)


def _load(name: str, entries: list[EntryPoint]) -> type[PruningStrategy]:
    """Imports the one class behind a name and checks that it keeps the contract of a strategy."""
    if len(entries) > 1:
        claims = " and ".join(sorted(f"{entry.dist.name} ({entry.value})" for entry in entries))
        raise UnknownStrategyError(f"The name {name!r} is claimed by {claims}; uninstall all but one of them.")
    entry = entries[0]
    origin = f"Strategy {name!r} of {entry.dist.name} {entry.dist.version} ({entry.value})"
    try:
        loaded = entry.load()
    except Exception as error:  # importing runs code of a third party, which may raise anything; it is passed on
        raise UnknownStrategyError(f"{origin} cannot be imported: {type(error).__name__}: {error}") from error
    fault = _contract_fault(name, loaded)
    if fault:
        raise UnknownStrategyError(f"{origin} is not usable: {fault}.")
    return loaded


def _contract_fault(name: str, loaded: Any) -> str | None:
    """Says how a loaded object breaks the contract of `PruningStrategy`, if it does."""
    from .strategies.base import PruningStrategy  # strategies use this package; the registry only asks for the type

    if not (isinstance(loaded, type) and issubclass(loaded, PruningStrategy)):
        return f"{loaded!r} is not a subclass of PruningStrategy"
    if inspect.isabstract(loaded):
        return f"{loaded.__name__} does not implement {', '.join(sorted(loaded.__abstractmethods__))}"
    if getattr(loaded, "name", None) != name:
        return f"{loaded.__name__}.name is {getattr(loaded, 'name', None)!r}, its entry point is called {name!r}"
    if not (isinstance(loaded.Options, type) and is_dataclass(loaded.Options)):
        return f"{loaded.__name__}.Options is not a dataclass"
    return None


def _fit_option(strategy: str, name: str, value: Any, kind: Any) -> Any:
    """Returns `value` as the type of its field, or says which type that is."""
    try:
        return _fit(value, kind)
    except ValueError as error:
        raise ConfigurationError(
            f"Option {name!r} of strategy {strategy!r} must be {_describe_kind(kind)}, not {value!r}."
        ) from error


def _fit(value: Any, kind: Any) -> Any:
    """Returns `value` as `kind`; strings are parsed. Kinds that are not listed here are left to the dataclass."""
    if get_origin(kind) in (Union, types.UnionType):
        return _fit_union(value, get_args(kind))
    if get_origin(kind) is Literal:
        return _fit_literal(value, get_args(kind))
    if kind is type(None):
        return _fit_literal("None" if value == "none" else value, (None,))
    if kind is bool:
        return _fit_bool(value)
    if kind in (int, float):
        allowed = (str, int) if kind is int else (str, int, float)
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise ValueError(value)
        return kind(value)
    if kind is str and not isinstance(value, str):
        raise ValueError(value)
    return value


def _fit_union(value: Any, kinds: tuple[Any, ...]) -> Any:
    """Fits a value to the narrowest member that takes it; `str`, which takes every string, comes last."""
    narrow_first = [kind for kind in (type(None), bool, int, float) if kind in kinds]
    for kind in (*narrow_first, *(kind for kind in kinds if kind not in narrow_first)):
        try:
            return _fit(value, kind)
        except ValueError:
            continue  # the next member may take it; after the last one the loop ends in the error below
    raise ValueError(value)


def _fit_literal(value: Any, choices: tuple[Any, ...]) -> Any:
    """Returns the choice that equals `value`, or that the string `value` spells."""
    for choice in choices:
        if value == str(choice) or (type(value) is type(choice) and value == choice):
            return choice
    raise ValueError(value)


def _fit_bool(value: Any) -> bool:
    """Returns a bool, or what the usual words on a command line mean."""
    if isinstance(value, str):
        value = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(value.lower())
    if not isinstance(value, bool):
        raise ValueError(value)
    return value


def _describe_kind(kind: Any) -> str:
    """Names a type in an error message."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_describe_kind(member) for member in get_args(kind))
    if get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in get_args(kind))
    if kind is type(None):
        return "None"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, str(kind))
