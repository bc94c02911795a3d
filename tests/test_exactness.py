# SPDX-License-Identifier: Apache-2.0
"""The sweep: every architecture that can be built tiny is pruned exactly or refused before any work.

About thirty types lose some blocks by default. As slow tests all of them do, in all ways;
`benchmarks/architectures.py` writes the outcome down.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
import transformers
from exactness import EXACT, REFUSED, SUBJECTS, WRONG, Subject, Verdict, judge, judge_files, removals
from torch import Tensor
from zoo import causal

from optimum_blockprune.batches import Batch
from optimum_blockprune.errors import UnsupportedModelError
from optimum_blockprune.runner import BlockRunner


pytestmark = pytest.mark.usefixtures("no_pictures")


# One of each way in which architectures depend on their blocks.
REDUCED = (
    *("bert", "bloom", "deepseek_v3", "dory", "falcon_h1"),
    *("gemma4_text", "gemma4_text#kv_shared", "glm_moe_dsa", "gpt2#inverse_layer_scaling", "gpt_neo", "gpt_oss"),
    *("granitemoehybrid", "jamba", "lfm2", "llama4_text", "mamba", "minicpm3", "modernbert-decoder"),
    *("nemotron_h", "qwen3_moe#sparse_step_2", "qwen3_next", "recurrent_gemma", "rwkv", "xglm", "xlnet", "zaya"),
)
REDUCED_OTHERS = (
    *("gemma3", "llava", "qwen2_5_vl", "qwen3_vl"),
    *("bert", "deberta-v2", "distilbert", "modernbert", "roberta"),
    *("bart", "t5", "whisper"),
)


# The last bits of its experts' sums depend on where in memory the inputs lie: two plain passes may differ.
NOT_REPEATABLE = ("switch_transformers",)


def _chosen(subject: Subject) -> bool:
    return subject.name in (REDUCED if subject.group == "causal" else REDUCED_OTHERS)


def _assert_exact_or_refused(verdict: Verdict) -> None:
    assert verdict.status in (EXACT, REFUSED), verdict.reason
    if verdict.status == REFUSED:
        # A refusal names the type, and ends with what would be possible.
        assert "odel type '" in verdict.reason
        assert len(verdict.reason) > 60


def _judge_all(subject: Subject, without: Collection[str] = ()) -> None:
    for name, removed in removals(subject, subject.depth(subject.model())).items():
        if name not in without:
            _assert_exact_or_refused(judge(subject, removed))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("subject", [each for each in SUBJECTS if _chosen(each)], ids=str)
def test_reduced_sweep(subject: Subject) -> None:
    # What is left are two that are apart, the first one, and all of a kind.
    _judge_all(subject, without=("inner", "last", "random"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_whole_sweep(subject: Subject) -> None:
    _judge_all(subject)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_files_are_pruned_like_models(subject: Subject) -> None:
    _assert_exact_or_refused(judge_files(subject, (3, 1)))


def _batch(inputs: dict[str, Tensor]) -> Batch:
    """The zoo's inputs as the runner takes them: of an encoder-decoder, the decoder's tokens come first."""
    extra = dict(inputs)
    return Batch(extra.pop("decoder_input_ids" if "decoder_input_ids" in extra else "input_ids"), extra=extra)


def _runs_like_the_model(subject: Subject) -> None:
    model = subject.model()
    try:
        runner = BlockRunner(model, subject.stack)
        for inputs in subject.inputs(model):
            logits, plain = runner.logits(_batch(inputs)), subject.logits(model, inputs)
            if subject.model_type in NOT_REPEATABLE:
                torch.testing.assert_close(logits, plain)
            else:
                assert torch.equal(logits, plain)
    except UnsupportedModelError as error:
        assert "odel type '" in str(error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("subject", [each for each in SUBJECTS if _chosen(each)], ids=str)
def test_the_runner_with_nothing_off_is_the_model(subject: Subject) -> None:
    _runs_like_the_model(subject)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("subject", [each for each in SUBJECTS if not _chosen(each)], ids=str)
def test_the_runner_is_the_model_everywhere(subject: Subject) -> None:
    _runs_like_the_model(subject)


def test_a_wrong_result_is_seen() -> None:
    """The sweep itself can fail: a truth with another block silenced is not met."""
    subject = next(each for each in SUBJECTS if each.name == "llama")

    class Mistaken(Subject):
        def silenced(self, model, off):  # noqa: ANN001, ANN202
            return super().silenced(model, [block + 1 for block in off])

    assert judge(subject, (1,)).status == EXACT
    assert judge(Mistaken("causal", "llama"), (1,)).status == WRONG


def test_every_type_is_in_the_zoo_or_has_a_reason() -> None:
    results = Path(__file__).parents[1] / "benchmarks" / "results" / "architectures.json"
    swept = json.loads(results.read_text(encoding="utf-8"))["versions"]["transformers"]
    if transformers.__version__ != swept:
        pytest.skip(f"the zoo holds the types of transformers {swept}; a newer one may have more")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    built = {facts["model_type"] for facts in causal.SPECIMENS.values()}
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= built | set(causal.UNBUILT)
    assert all(len(reason) > 15 for reason in causal.UNBUILT.values())
