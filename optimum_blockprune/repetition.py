# SPDX-License-Identifier: Apache-2.0
"""How much generated text repeats itself, and whether a pruned model's text has degenerated. Plain Python, no model.

A pruned model can keep a fair perplexity, which is measured on text that people wrote, and still loop when it reads
its own words. Counting n-grams shows that without a judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


# Our choice, see `degenerated`: a rise of repetition, repetition alone, the share of the dense model's distinct-2 that
# is too little, a rise of distinct-2, and the share of its tokens that is too short.
_RISE, _EXTREME, _POOR, _VARIED, _SHORT = 0.2, 0.75, 0.5, 0.15, 0.25


def repetition_rate(tokens: Sequence[Any], n: int = 4) -> float:
    """The share of n-grams that have been there before: 1 - distinct n-grams / n-grams.

    "seq-rep-n" of Welleck et al. 2020, "Neural Text Generation With Unlikelihood Training" (arXiv 1908.04319).

    Args:
        tokens: One continuation, without the prompt.
        n: Length of the n-grams.

    Returns:
        0 to just below 1; 0 for fewer than `n` tokens.
    """
    grams = list(_grams(tokens, n))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(continuations: Sequence[Sequence[Any]], n: int) -> float:
    """Distinct n-grams / n-grams over all continuations together.

    "distinct-n" of Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models"
    (arXiv 1510.03055). It falls with the number of tokens, so compare figures of one length only.

    Args:
        continuations: Each without its prompt.
        n: Length of the n-grams.

    Returns:
        Above 0 to 1; 0 if there is no n-gram at all.
    """
    grams = [gram for tokens in continuations for gram in _grams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def degenerated(pruned: Mapping[str, Any], dense: Mapping[str, Any] | None = None) -> str | None:
    """Says why generated text looks degenerated; `None` if it does not.

    Small models repeat themselves under greedy decoding whether pruned or not, so what counts is the change:
    repetition up by 0.2; distinct-2 halved; distinct-2 up by 0.15 (words in no order repeat little); a quarter of the
    tokens. Without a dense model, repetition of 0.75.

    The bounds are our choice, from SmolLM2-135M on WikiText-2 (repetition, distinct-2): dense 0.47, 0.35; fair with 3
    of 30 blocks less (0.61, 0.23); loops with 6 to 12 less (0.78 to 0.84, at most 0.12); a few words over and over
    without the last 3 (0.51, 0.14); word salad with 15 less (0.25, 0.55).

    Nonsense that repeats itself as much as the dense model does is not seen: without 6 random blocks that model has
    0.49 and 0.29, and a perplexity of 1,756. Nor is anything seen of truth or sense. Read perplexity beside it.

    Args:
        pruned: What `generation.check_generation` returns for the pruned model.
        dense: The same for the dense model, on the same prompts.

    Returns:
        A clause such as "63% of the 4-grams that it writes are repeats (the dense model: 21%)".
    """
    rate, variety = pruned["repetition"], pruned["distinct_2"]
    if dense is None:
        return f"{rate:.0%} of the 4-grams that it writes are repeats" if rate >= _EXTREME else None
    usual, usual_variety = dense["repetition"], dense["distinct_2"]
    if "tokens" in pruned and pruned["tokens"] < _SHORT * dense.get("tokens", 0):
        return f"it writes {pruned['tokens']:,} tokens and ends (the dense model: {dense['tokens']:,})"
    if rate >= usual + _RISE:
        return f"{rate:.0%} of the 4-grams that it writes are repeats (the dense model: {usual:.0%})"
    if variety <= _POOR * usual_variety:
        return f"{variety:.0%} of the 2-grams that it writes are distinct (the dense model: {usual_variety:.0%})"
    if variety >= usual_variety + _VARIED:
        return (
            f"{variety:.0%} of the 2-grams that it writes are distinct (the dense model: {usual_variety:.0%}), as of "
            "words in no order"
        )
    return None


def collapsed(evaluations: Sequence[Mapping[str, Any]]) -> str | None:
    """`degenerated` for the entries of a report: the last of the pruned model, and the dense model's on that text."""
    written = [entry for entry in evaluations if entry.get("generation")]
    last = next((entry for entry in reversed(written) if entry.get("label") == "pruned"), None)
    if last is None:
        return None
    alike = [e for e in written if e.get("label") == "dense" and e.get("fingerprint") == last.get("fingerprint")]
    return degenerated(last["generation"], alike[-1]["generation"] if alike else None)


def _grams(tokens: Sequence[Any], n: int) -> Iterator[tuple[Any, ...]]:
    return zip(*(tokens[start:] for start in range(n)), strict=False)
