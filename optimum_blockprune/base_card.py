# SPDX-License-Identifier: Apache-2.0
"""What is known of the model that is pruned: its version, licence and languages, from its card or its GGUF header.

Nothing here stops a pruning run: a card that is not there, cannot be fetched or cannot be read states nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from optimum.utils import logging

from .card_text import HUB, commit_of, hub_id, one_line
from .errors import CheckpointError
from .loading import split_gguf
from .report import REPORT_FILE, PruningReport


logger = logging.get_logger("optimum.blockprune.base_card")

CARD_FILE = "README.md"
_PROBE_SECONDS = 10.0
_STATED = ("license", "license_name", "license_link")
_GGUF_KEYS = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
    "language": "general.languages",
}

# A connection that fails raises the base error of the HTTP library, whichever the version of huggingface_hub uses.
_NOT_FETCHED = (OSError, ValueError, *HfHubHTTPError.__bases__)


def base_facts(path_or_repo: str | Path, *, config: Any = None, network: bool, **hub: Any) -> dict[str, Any]:
    """Collects what is known of a base model, for `report.base`.

    Args:
        path_or_repo: Repo id, folder or `.gguf` file, as for `loading.load_model`.
        config: Its configuration, which may know the commit that it came from.
        network: Whether the card may be fetched: only where the model itself was loaded from the Hub in this call.
            Otherwise, what lies in the local cache is read.
        **hub: Arguments of the load; `revision`, `token`, `cache_dir`, `local_files_only` and `gguf_file` count.

    Returns:
        `model`, and where they are known `revision` (the commit), `license`, `license_name`, `license_link`,
        `language` (a list of codes) and `card` (where these were read); `gguf_file`, `subfolder` and `remote_code`
        (its own code was run) where it was loaded so. Several licences are a list.
    """
    path, hub = split_gguf(path_or_repo, hub)
    commit = getattr(config, "_commit_hash", None) or commit_of(path)  # transformers 5.24 notes none any more
    if Path(path).exists():
        stated = _of_folder(Path(path), hub.get("gguf_file"), is_file=Path(path_or_repo).is_file())
        repo = hub_id(path) if commit else None
    else:
        repo = path
        commit = commit or (_loaded_commit(path, hub) if network else None)
        stated = _of_repo(path, _card_of(path, commit, network, hub), commit, hub)
    facts = {"model": repo or str(path_or_repo), **({"revision": commit} if commit else {})}
    return {**facts, **_how_loaded(config, hub), **stated}


def _how_loaded(config: Any, hub: Mapping[str, Any]) -> dict[str, Any]:
    """Which part of the place it is, and whether its own code was run."""
    facts = {name: str(hub[name]) for name in ("gguf_file", "subfolder") if hub.get(name)}
    own_code = hub.get("trust_remote_code") and getattr(config, "auto_map", None)
    return {**facts, "remote_code": True} if own_code else facts


def _of_folder(folder: Path, gguf_file: str | None, *, is_file: bool) -> dict[str, Any]:
    """Facts from files: the card, or the report of a folder that was pruned itself.

    Beside a GGUF file that was named itself, a card may be about anything: there the header is first.
    """
    card = _of_card(folder / CARD_FILE, CARD_FILE)
    if gguf_file is None:
        return card or _of_report(folder)
    header = _of_gguf(folder / gguf_file)
    return (header or card) if is_file else (card or header)


def _of_report(folder: Path) -> dict[str, Any]:
    """What a pruned folder inherited, where its card is gone."""
    if not (folder / REPORT_FILE).is_file():
        return {}
    try:
        base = PruningReport.from_file(folder).base
        return _stated(base, str(base.get("card", REPORT_FILE)))
    except (CheckpointError, AttributeError) as error:
        logger.warning(f"The report of the base model cannot be read: {_first_line(error)}")
        return {}


def _of_repo(repo: str, card: str | None, commit: str | None, hub: Mapping[str, Any]) -> dict[str, Any]:
    """Facts from the card of a repository; without one, from the header of its GGUF file, which was loaded already."""
    facts = _of_card(Path(card), f"{HUB}/{repo}/blob/{commit or 'main'}/{CARD_FILE}") if card else {}
    if facts or "gguf_file" not in hub:
        return facts
    file = _cached(repo, hub["gguf_file"], commit, hub)
    return _of_gguf(Path(file)) if file else {}


def _card_of(repo: str, commit: str | None, network: bool, hub: Mapping[str, Any]) -> str | None:
    """The local path of a repository's card: from the cache, or fetched where that was asked for."""
    found = _cached(repo, CARD_FILE, commit, hub)
    if found or not network or hub.get("local_files_only"):
        return found
    revision = commit or hub.get("revision")
    try:
        # Without a connection a download is tried again for half a minute; one small request knows at once.
        HfApi(token=hub.get("token")).model_info(repo, revision=revision, timeout=_PROBE_SECONDS, expand=["sha"])
        arguments = {name: hub[name] for name in ("token", "cache_dir") if name in hub}
        return hf_hub_download(repo, CARD_FILE, revision=revision, **arguments)
    except _NOT_FETCHED as error:
        logger.info(f"The card of '{repo}' is not read, so its licence is not known: {_first_line(error)}")
        return None


def _loaded_commit(repo: str, hub: Mapping[str, Any]) -> str | None:
    """The commit of a repository that was loaded just now, from where its files lie in the cache."""
    names = (hub.get("gguf_file"), "/".join(filter(None, (hub.get("subfolder"), "config.json"))))
    found = [_cached(repo, name, None, hub) for name in names if name]
    return next((commit_of(path) for path in found if path), None)


def _cached(repo: str, file: str, commit: str | None, hub: Mapping[str, Any]) -> str | None:
    try:
        found = try_to_load_from_cache(
            repo, file, cache_dir=hub.get("cache_dir"), revision=commit or hub.get("revision")
        )
    except ValueError:  # not the name of a repository
        return None
    return found if isinstance(found, str) else None  # it may also be known that there is none


def _of_card(path: Path, place: str) -> dict[str, Any]:
    """What the metadata of a card states; nothing if there is no card, or none that can be read."""
    if not path.is_file():
        return {}
    try:
        data = metadata_load(path) or {}
    except Exception as error:  # a stranger's YAML fails in the parser in many ways; it then states nothing
        logger.warning(f"The metadata of the base model's card ({place}) cannot be read: {_first_line(error)}")
        return {}
    return _stated(data, place)


def _of_gguf(path: Path) -> dict[str, Any]:
    """What the header of a GGUF file states; nothing without the package that reads it."""
    try:
        from gguf import GGUFReader
    except ImportError:
        return {}
    try:
        fields = GGUFReader(path).fields
        values = {name: _texts(fields[key]) for name, key in _GGUF_KEYS.items() if key in fields}
    except (OSError, ValueError, LookupError) as error:
        logger.warning(f"The header of '{path.name}' cannot be read: {_first_line(error)}")
        return {}
    single = {name: texts[0] for name, texts in values.items() if name != "language" and texts}
    return _stated({**single, "language": values.get("language")}, path.name)


def _texts(field: Any) -> list[str]:
    """The strings of a field of the header, one or several."""
    return [bytes(field.parts[index]).decode("utf-8") for index in field.data]


def _stated(data: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Picks what has the form that the Hub knows; `place` is said where anything was found."""
    facts: dict[str, Any] = {name: text for name in _STATED if (text := _only(data.get(name))) is not None}
    several = data.get("license")
    if isinstance(several, list) and len(several) > 1 and all(map(_only, several)):
        facts["license"] = several
    languages = data.get("language")
    codes = [_code(each) for each in (languages if isinstance(languages, list) else [languages])]
    if any(codes):
        facts["language"] = [code for code in codes if code]
    return {**facts, "card": place} if facts else {}


def _only(value: Any) -> str | None:
    """A text on one line, or the only one of a list."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return one_line(value) or None if isinstance(value, str) else None


def _code(value: Any) -> str | None:
    """A language code; YAML reads an unquoted `no` (Norwegian) as False."""
    return "no" if value is False else _only(value) if isinstance(value, str) else None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no details'])[0]}"
