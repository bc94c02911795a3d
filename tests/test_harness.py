# SPDX-License-Identifier: Apache-2.0
"""lm-eval is found, asked for what it has, and leaves nothing behind in the process or the model."""

from __future__ import annotations

import os
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_model
from toys import assert_unchanged, snapshot, word_tokenizer

from optimum_blockprune import harness
from optimum_blockprune.errors import ConfigurationError


def test_without_lm_eval_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    harness.check_installed()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigurationError, match=r"installed is none: pip install 'optimum-blockprune\[eval\]'"):
        harness.check_installed()


def test_an_old_lm_eval_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.Distribution.version", "0.4.11")
    with pytest.raises(ConfigurationError, match=r"0\.4\.12 or later; installed is 0\.4\.11"):
        harness.check_installed()


@pytest.mark.slow
def test_tasks_of_lm_eval_are_known_and_others_have_neighbours() -> None:
    """Reads lm-eval's whole index, which takes ten seconds."""
    harness.check_known(["arc_easy", "lambada_openai", "mmlu", "winogrande"])
    with pytest.raises(ConfigurationError, match="has no task 'hellaswagg'. Did you mean 'hellaswag'"):
        harness.check_known(["arc_easy", "hellaswagg"])


def test_a_process_is_as_it_was(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def drawn() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(1).item()

    for variable in (None, "0"):
        if variable is not None:
            monkeypatch.setenv("DISABLE_MULTIPROC", variable)
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        expected = drawn()
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        inside = []
        for _ in range(2):
            with harness.own_process(3):
                inside.append(drawn())
                sys.stdout.write("noise")
                assert os.environ["DISABLE_MULTIPROC"] == "1"
        assert inside[0] == inside[1] != expected
        assert drawn() == expected
        assert os.environ.get("DISABLE_MULTIPROC") == variable
    assert capsys.readouterr().out == ""


def test_a_process_is_as_it_was_after_an_error() -> None:
    state = random.getstate()
    with pytest.raises(KeyError), harness.own_process(3):
        raise KeyError
    assert random.getstate() == state
    assert "DISABLE_MULTIPROC" not in os.environ


@pytest.mark.parametrize("tied", [True, False])
def test_a_wrapped_model_is_the_model_and_does_not_change(tied: bool) -> None:
    model, tokenizer = tiny_model("llama", tie_word_embeddings=True), word_tokenizer()
    tokenizer.pad_token = None
    if not tied:  # as after a merge: the configuration says that they are
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    before, words = snapshot(model), len(tokenizer)
    wrapped = harness.wrap(model, tokenizer, backend="causal", batch_size=2)
    assert wrapped.model is model
    assert (wrapped.batch_size_per_gpu, wrapped.backend) == (2, "causal")
    assert_unchanged(model, before)
    assert "tie_weights" not in vars(model)
    assert tokenizer.pad_token is None
    assert len(tokenizer) == words


class Scripted:
    """A task whose settings are given; what lm-eval would build from a file of its own."""

    def __init__(self, **attributes: Any) -> None:
        self.settings: dict[str, Any] = {"num_fewshot": attributes.pop("num_fewshot", None)}
        self.__dict__ |= attributes
        self.seeds: list[int] = []

    def get_config(self, name: str) -> Any:
        return self.settings[name]

    def set_config(self, name: str, value: Any) -> None:
        self.settings[name] = value

    def set_fewshot_seed(self, seed: int) -> None:
        self.seeds.append(seed)


@pytest.mark.parametrize(
    ("stated", "asked", "used"), [(None, None, 0), (5, None, 5), (5, 2, 2), (None, 3, 3), (5, 0, 0)]
)
def test_examples_are_as_many_as_asked_for(stated: int | None, asked: int | None, used: int) -> None:
    task = Scripted(num_fewshot=stated)
    harness.prepare({"one": task}, (), asked, 7)
    assert (task.settings["num_fewshot"], task.seeds) == (used, [7])


def test_a_task_without_examples_stays_so_in_the_open(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(harness.logger, "warning", said.append)
    task, ready = Scripted(num_fewshot=0), Scripted(num_fewshot=0)
    harness.prepare({"one": task, "file": ready}, ("file",), 5, 0)
    assert task.settings["num_fewshot"] == ready.settings["num_fewshot"] == 0
    assert said == ["The task 'one' is defined without examples and stays so."]


@pytest.mark.parametrize(("attribute", "said"), [("UNSAFE_CODE", "runs code"), ("MULTIMODAL", "more than text")])
def test_tasks_that_cannot_run_here_are_refused(attribute: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=f"'one' .*{said}.*lm_eval run"):
        harness.prepare({"one": Scripted(**{attribute: True})}, (), None, 0)
