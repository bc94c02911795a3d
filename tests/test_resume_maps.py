# SPDX-License-Identifier: Apache-2.0
"""Searches with compensation that are killed and started again end as if nothing had happened; see `test_resume`."""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_resume import Server, ledgers
from tiers import often
from toys import config, text, wide, word_tokenizer

from optimum_blockprune import BlockPruner, run_costs
from optimum_blockprune.resuming import default_folder


WINDOWS = {"num_samples": 8, "seqlen": 16, "batch_size": 2}
# The sums of one start at a time.
GROUPS = 1
WAYS = {
    "blocks": ["--compensation", "ridge"],
    "halves": ["--compensation", "auto", "--unit", "half_block"],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that maps help, as a folder, and text beside it."""
    place = tmp_path_factory.mktemp("place")
    wide("llama").save_pretrained(place / "dense")
    word_tokenizer().save_pretrained(place / "dense")
    (place / "text.txt").write_text(text(400, seed=5))
    return place


@pytest.fixture(scope="module")
def undisturbed(server: Server, place: Path) -> dict[str, Path]:
    """Plans of runs that nothing hit."""
    for way in WAYS:
        ended = server.run(*flags(place, way), place / f"{way}.json", max_bytes=GROUPS)
        assert ended.code == 0, ended.log
    return {way: place / f"{way}.json" for way in WAYS}


def flags(place: Path, way: str) -> list[str]:
    windows = [word for name, value in WINDOWS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    model = ["-m", str(place / "dense"), "--dataset", str(place / "text.txt")]
    return ["plan", *model, "--strategy", "search", "--num-blocks", "2", *WAYS[way], *windows, "--output"]


# Killed


def still_of_use(kept: Iterable[str]) -> list[str]:
    """Without what a map was made of that is kept: a run may be killed before it deletes these."""
    settled = {found[1] for found in map(re.compile(r"compensation-(\d+)-map-").match, kept) if found}
    made_of = re.compile(rf"(own-)?compensation-({'|'.join(settled) or 'none'})-(?!map-)")
    return [name for name in kept if not made_of.match(name)]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
@pytest.mark.parametrize("way", often(WAYS, kept=lambda way: way == "halves"))
def test_plan_and_maps_survive_kills(
    way: str, seed: int, server: Server, place: Path, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    generator, output, codes = random.Random(seed), tmp_path / "plan.json", []
    kept: dict[str, int] = {}
    while -signal.SIGKILL in codes[-1:] or not codes:
        # A measurement that is made but not kept takes the run no further: at least the second one.
        number = generator.randint(1, 5)
        whole = number == 1 or generator.random() < 0.5
        ended = server.run(*flags(place, way), output, at_write=(number, whole), max_bytes=GROUPS)
        codes.append(ended.code)
        now = ledgers(default_folder(output)) if default_folder(output).exists() else {}
        if ended.code:
            assert kept.items() <= now.items(), "a finished measurement is gone or was made again"
            assert len(now) == len(kept) + number - (not whole), ended.log
            kept = now
    assert ended.code == 0 and len(codes) > 1, ended.log
    assert f"{len(still_of_use(kept))} measurements were read from" in ended.log
    assert output.read_bytes() == undisturbed[way].read_bytes()
    folds = undisturbed[way].with_suffix(".folds")
    assert folds.is_file() and output.with_suffix(".folds").read_bytes() == folds.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "plan.folds"}


# What is measured again


def pruner(**fields: Any) -> BlockPruner:
    wanted = {"strategy": "search", "compensation": "ridge", "num_samples": 8, "seqlen": 16, **fields}
    return BlockPruner(wide("llama"), config(**wanted), word_tokenizer())


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The part, and the first piece, of the starts that maps were fitted for, which come in several groups."""
    seen: list[tuple[int, int]] = []
    maps = run_costs._Part._maps

    def noted(part: Any, group: Any) -> Any:
        seen.extend((part.number, start.piece) for start in group)
        return maps(part, group)

    monkeypatch.setattr(run_costs._Part, "_maps", noted)
    monkeypatch.setattr(run_costs, "_MAX_BYTES", GROUPS)
    return seen


def kept_and_failed(made: BlockPruner, folder: Path) -> None:
    """Plans, and leaves the ledger of a whole search."""
    with pytest.MonkeyPatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr("optimum_blockprune.pruner.apply_in_order", lambda *_args, **_kwargs: 1 // 0)
        made.prune(resume_dir=folder)


@pytest.mark.parametrize("lost", [(), (1,), (2, 4), (1, 2, 3, 4)])
def test_maps_are_fitted_only_where_the_ledger_lacks_the_group(
    lost: tuple[int, ...], fitted: list[tuple[int, int]], tmp_path: Path
) -> None:
    first, kept = pruner(), tmp_path / "kept"
    kept_and_failed(first, kept)
    assert fitted[:4] == [(1, 1), (1, 2), (1, 3), (1, 4)] and {part for part, _ in fitted} == {1, 2, 3, 4}
    lost = [each for each in fitted if each[1] in lost]
    for part, piece in lost:
        (path,) = kept.rglob(f"runs-ridge-2-{part}-{piece}-1-*.safetensors")
        path.unlink()
    del fitted[:]
    second = pruner()
    plan = second.make_plan(resume_dir=kept)
    assert fitted == lost and plan.to_dict() == first.plan.to_dict()
    assert (second.report.block_forwards < first.report.block_forwards) and not kept.exists()


def test_a_damaged_group_is_fitted_again(fitted: list[tuple[int, int]], tmp_path: Path) -> None:
    first, kept = pruner(), tmp_path / "kept"
    kept_and_failed(first, kept)
    (path,) = kept.rglob("runs-ridge-2-1-3-1-*.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    del fitted[:]
    assert pruner().make_plan(resume_dir=kept).to_dict() == first.plan.to_dict()
    assert fitted == [(1, 3)]
