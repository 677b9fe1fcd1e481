"""A small BERT (`benchmarks.small_bert`) that is trained on RTE or on part of SST-2 by transformers' Trainer, and
retrained on halves of the rows, for `benchmarks.lds`."""

from __future__ import annotations

import copy
import gzip
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.retrained import OnStep
from benchmarks.small_bert import saved_classifier
from gradtrace.task import Batch
from gradtrace.tasks import SequenceClassification, data_file

BATCH_SIZE = 16
EPOCHS = {"rte": 8, "sst2": 4}
_LEARNING_RATES = {"rte": 3e-4, "sst2": 1e-3}  # at three times as much, RTE is not even learned by heart


class _Glue(SequenceClassification):
    """Explains the margin of the right class.

    Args:
        directory: keeps the weights that training starts from, and the tokenizer.
        train_rows, queries: at most.
    """

    classes_in_order: ClassVar[tuple[str, str]]
    files: ClassVar[tuple[str, str]]
    text_columns: ClassVar[dict[str, str]]
    epochs: ClassVar[int]
    learning_rate: ClassVar[float]

    def __init__(self, directory: str | Path, train_rows: int, queries: int) -> None:
        whole, held_out = (_rows(name) for name in self.files)
        texts = [row[column] for row in whole for column in self.text_columns.values()]
        model = saved_classifier(Path(directory) / self.files[0], texts, self.classes_in_order)
        super().__init__(model, _drawn(whole, train_rows), _drawn(held_out, queries), **self.text_columns)

    def measurement(self, model: nn.Module, batch: Batch) -> Tensor:
        """The negative margin (Park et al. 2023, section 3.3)."""
        logits, labels = self.predict(model, batch), batch["label"][:, None]  # [batch, 2], [batch, 1]
        return (logits.gather(1, 1 - labels) - logits.gather(1, labels))[:, 0]

    def fit(self, rows: Sequence[int], seed: int, on_step: OnStep = lambda model, optimizer: None) -> nn.Module:
        """AdamW with a learning rate that falls linearly to zero; the seed chooses the order of the rows."""
        from transformers import Trainer, TrainingArguments

        model = copy.deepcopy(self.model())
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as scratch:
            arguments = TrainingArguments(
                scratch,
                num_train_epochs=self.epochs,
                per_device_train_batch_size=BATCH_SIZE,
                learning_rate=self.learning_rate,
                weight_decay=0.01,
                max_grad_norm=0.0,
                remove_unused_columns=False,
                save_strategy="no",
                logging_strategy="no",
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                seed=seed,
            )
            examples = [self.train[row] for row in rows]
            Trainer(
                model,
                arguments,
                train_dataset=examples,  # type: ignore[arg-type, unused-ignore]  # anything with a length and items
                data_collator=self._with_labels,
                callbacks=[_after_steps(on_step)],
            ).train()
        return model

    def _with_labels(self, examples: list[Any]) -> dict[str, Tensor]:
        """The batch under the names of the model's arguments."""
        batch = self.collate(examples)
        return {"labels" if name == "label" else name: value for name, value in batch.items()}


class Rte(_Glue):
    """Does a sentence follow from a text? This model learns the training pairs by heart, and nothing about others."""

    classes_in_order, files = ("entailment", "not_entailment"), ("rte-train", "rte-validation")
    text_columns: ClassVar = {"text": "premise", "text_pair": "hypothesis"}
    epochs, learning_rate = EPOCHS["rte"], _LEARNING_RATES["rte"]

    def __init__(self, directory: str | Path = "runs/rte", train_rows: int = 2_490, queries: int = 200) -> None:
        super().__init__(directory, train_rows, queries)


class Sst2(_Glue):
    """Does a film critic like it?"""

    classes_in_order, files = ("negative", "positive"), ("sst2-train-sentences", "sst2-validation")
    text_columns: ClassVar = {"text": "text"}
    epochs, learning_rate = EPOCHS["sst2"], _LEARNING_RATES["sst2"]

    def __init__(self, directory: str | Path = "runs/sst2-2k", train_rows: int = 2_000, queries: int = 200) -> None:
        super().__init__(directory, train_rows, queries)


def _rows(name: str) -> list[dict[str, Any]]:
    """Of a file of the data directory, by its name without endings."""
    with gzip.open(data_file(f"{name}.jsonl.gz"), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _after_steps(on_step: OnStep) -> Any:
    """A callback of the Trainer that calls `on_step` before the learning rate changes."""
    from transformers import TrainerCallback

    class AfterSteps(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_optimizer_step(self, *state: Any, **trained: Any) -> None:
            on_step(trained["model"], trained["optimizer"])

    return AfterSteps()


def _drawn(table: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Random rows, all of them if there are no more, in their order."""
    if count >= len(table):
        return table
    chosen = np.random.default_rng(0).choice(len(table), count, replace=False)
    return [table[row] for row in sorted(chosen)]
