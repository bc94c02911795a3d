# SPDX-License-Identifier: Apache-2.0
"""Trains adapters with transformers' `Trainer`, which sees nothing but them: neither does a checkpoint.

The order of the windows is drawn beforehand and the model stays in evaluation mode, so that nothing is random but the
beginning of the adapters and their dropout, and a run that goes on from a checkpoint ends as an unbroken one does.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from optimum.utils import logging
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from .adapters import ADAPTER
from .batches import Batch, CalibrationWindows
from .errors import NonFiniteError, OutputError
from .healing_spec import HealingSpec
from .inputs import Caller, evaluating, vocabulary_of
from .losses import head_rows, targets_of
from .runner import BlockRunner


logger = logging.get_logger("optimum.blockprune.training")

# Inputs of a batch -> its mean loss, a scalar with a gradient.
Loss = Callable[[Batch, Tensor], Tensor]
# Positions whose float32 copies exist at one time; our choice.
_POSITIONS = 1024
_STATE = "trainer_state.json"


class Student(nn.Module):
    """The adapters as a module of their own; calling it runs the model around them.

    Args:
        caller: Calls the model.
        layers: peft's layers inside the model.
        device: Where the model takes its inputs.
    """

    def __init__(self, caller: Caller, layers: Mapping[str, nn.Module], device: torch.device) -> None:
        super().__init__()
        parts = ("lora_A", "lora_B", "lora_dropout")
        self.adapters = nn.ModuleList(
            nn.ModuleDict({name: getattr(layer, name)[ADAPTER] for name in parts}) for layer in layers.values()
        )
        self._caller, self._input_device = caller, device

    def forward(self, batch: Batch) -> Tensor:
        """Logits `[B, S, vocabulary]`."""
        return self._caller(batch, self._input_device)


class HealingTrainer(Trainer):
    """A `Trainer` with our loss and our order of the windows."""

    def __init__(self, student: Student, arguments: TrainingArguments, windows: Any, loss: Loss) -> None:
        super().__init__(student, arguments)
        self._windows, self._loss = windows, loss
        # It prints.
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader:
        """The windows in the order that was drawn."""
        return self._windows

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over the positions of the batch that predict something.

        Raises:
            NonFiniteError: It is NaN or infinite.
        """
        batch = Batch(inputs["input_ids"], inputs.get("attention_mask"))
        logits = model(batch)
        loss = self._loss(batch, logits)
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"The loss of step {self.state.global_step + 1} is NaN or infinite: lower learning_rate, or load the "
                "model in another dtype (float16 overflows where bfloat16 and float32 do not)."
            )
        loss = loss.to(self.args.device)
        return (loss, logits) if return_outputs else loss


class _Progress(TrainerCallback):
    """A bar on stderr."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Opens it where the training begins."""
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="Healing", leave=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One more step."""
        self._bar.update(1)

    def close(self) -> None:
        """Closes it, if it was opened."""
        getattr(self, "_bar", tqdm(disable=True)).close()


def next_token_loss(batch: Batch, logits: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next tokens, in nats; padding is left out."""
    targets = targets_of(batch).to(logits.device)
    scored = targets != -100
    return F.cross_entropy(logits[scored].float(), targets[scored])


def distillation_loss(teacher: BlockRunner) -> Loss:
    """Mean KL(teacher || student) in nats over the positions that predict a token, at temperature 1.

    The teacher runs without gradients, on as many windows at a time as keep its logits below 256 MiB, and on one
    window at least. Knowledge distillation: Hinton et al. 2015 (arXiv 1503.02531).
    """
    vocabulary = vocabulary_of(teacher.stack.layout)

    def loss(batch: Batch, logits: Tensor) -> Tensor:
        total, count = logits.new_zeros((), dtype=torch.float32), 0
        for rows, part in head_rows(batch, vocabulary):
            scored = targets_of(part) != -100
            truth = teacher.logits(part)
            truth, mine = truth[scored.to(truth.device)], logits[rows][scored.to(logits.device)]
            count += len(mine)
            for wanted, found in zip(truth.split(_POSITIONS), mine.split(_POSITIONS), strict=True):
                wanted = wanted.to(found.device).float().log_softmax(-1)
                total = total + F.kl_div(found.float().log_softmax(-1), wanted, reduction="sum", log_target=True)
        return total / count

    return loss


def train(
    student: Student,
    windows: CalibrationWindows,
    loss: Loss,
    spec: HealingSpec,
    *,
    checkpoints: Path | None = None,
) -> int:
    """Trains the adapters in place, from the last whole checkpoint if there is one.

    Args:
        student: The adapters with their model.
        windows: The text; drawn from without replacement until all were there, then anew.
        loss: Inputs and logits of a batch -> mean loss.
        spec: How.
        checkpoints: Folder for checkpoints; none are kept without it.

    Returns:
        Tokens seen by the whole training, padding not counted.

    Raises:
        NonFiniteError: The loss is NaN or infinite.
        OutputError: A checkpoint cannot be written.
    """
    order = _order(windows.num_windows, spec)
    progress = _Progress()
    with TemporaryDirectory() as nowhere:
        arguments = _arguments(spec, str(checkpoints or nowhere), student, keeps=checkpoints is not None)
        last = None if checkpoints is None else last_checkpoint(checkpoints)
        if last is not None:
            logger.info(f"Going on from '{last}'.")
        try:
            trainer = HealingTrainer(student, arguments, _loader(windows, order, spec.batch_size), loss)
            trainer.add_callback(progress)
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except (OSError, SafetensorError) as error:
            raise OutputError(f"A checkpoint cannot be written or read below '{checkpoints}': {error}.") from error
        finally:
            progress.close()
    real = torch.ones(windows.input_ids.shape) if windows.attention_mask is None else windows.attention_mask
    return int(real.sum(1)[torch.tensor(order)].sum())


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end: the state comes last."""
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*") if _is_whole(path)}
    return found[max(found)] if found else None


def _is_whole(checkpoint: Path) -> bool:
    if not checkpoint.name.rpartition("-")[2].isdigit():
        return False
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and "global_step" in state


def _arguments(spec: HealingSpec, folder: str, student: Student, *, keeps: bool) -> TrainingArguments:
    device = next(student.parameters()).device
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=spec.steps,
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=spec.warmup_steps,
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        save_strategy="steps" if keeps else "no",
        save_steps=spec.save_steps,
        save_total_limit=2,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        seed=spec.seed,
    )
    # As Trainer itself does for models that are spread out: a copy of the adapters on another GPU would have no model.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _order(count: int, spec: HealingSpec) -> list[int]:
    """Which window comes when: one random order of all of them after the other."""
    generator = torch.Generator().manual_seed(spec.seed)
    needed = spec.steps * spec.batch_size * spec.gradient_accumulation
    order: list[int] = []
    while len(order) < needed:
        order += torch.randperm(count, generator=generator).tolist()
    return order[:needed]


def _loader(windows: CalibrationWindows, order: list[int], batch_size: int) -> DataLoader:
    def collate(rows: list[int]) -> dict[str, Tensor]:
        batch = next(windows.part(rows).batches(len(rows)))
        masks = {} if batch.attention_mask is None else {"attention_mask": batch.attention_mask}
        return {"input_ids": batch.input_ids, **masks}

    batches = BatchSampler(order, batch_size, drop_last=False)
    return DataLoader(range(windows.num_windows), batch_sampler=batches, collate_fn=collate)


@contextmanager
def own_randomness(model: nn.Module, seed: int) -> Iterator[None]:
    """Seeds the global generators, and gives them back as they were: Trainer and peft draw from them."""
    python, array = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), evaluating(model):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
