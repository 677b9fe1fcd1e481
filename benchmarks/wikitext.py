"""A small GPT-2 that is fine-tuned on texts of WikiText-2, and retrained on halves of them, for `benchmarks.lds`.

614,016 weights: 2 layers x 96, embedding and head untied, a vocabulary of 2,000 byte pairs, texts of 64 tokens. The
texts are from the test file. Training starts from a model of other articles (the validation file), so that it is short.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.retrained import OnStep
from gradtrace.durable import write_whole
from gradtrace.task import Batch, Task
from gradtrace.tasks import data_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY, TOKENS = 2_000, 64
EPOCHS, BATCH_SIZE = 3, 16
_LEARNING_RATE = 1e-3
_PRETRAINING_EPOCHS, _PRETRAINING_BATCH, _PRETRAINING_RATE = 8, 32, 3e-3
_SHAPE = {"n_layer": 2, "n_embd": 96, "n_head": 4, "n_positions": TOKENS, "vocab_size": VOCABULARY}
_SHAPE |= {"bos_token_id": 0, "eos_token_id": 0}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class Wikitext2(Task):
    """Explains the mean loss of a text's tokens.

    Args:
        directory: keeps the vocabulary and the weights that training starts from; they are made at first use, which
            takes minutes.
        texts, queries: drawn from the same articles.
        pretraining_texts: at most, of other articles.
    """

    def __init__(
        self,
        directory: str | Path = "runs/wikitext2",
        texts: int = 1_500,
        queries: int = 100,
        pretraining_texts: int = 10_000,
    ) -> None:
        self.directory, self._texts, self._queries = Path(directory), texts, queries
        self._pretraining_texts = pretraining_texts

    @cached_property
    def train(self) -> Tensor:  # type: ignore[override]
        """int64 [texts, 64]."""
        return self._drawn[: self._texts]

    @cached_property
    def query(self) -> Tensor:  # type: ignore[override]
        """int64 [queries, 64]."""
        return self._drawn[self._texts :]

    def model(self) -> nn.Module:
        model = gpt2()
        model.load_state_dict(self._start)
        return model

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over the tokens after the first."""
        logits = model(input_ids=batch, use_cache=False).logits  # [batch, 64, 2000]
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        return losses.view(len(batch), -1).mean(1)

    def render(self, example: Tensor) -> dict[str, Any]:
        return {"text": self.tokenizer.decode(example.tolist())}

    def fit(self, rows: Sequence[int], seed: int, on_step: OnStep = lambda model, optimizer: None) -> nn.Module:
        """AdamW with a learning rate that falls linearly to zero, from the weights of the other articles."""
        texts, model = self.train[torch.as_tensor(rows)], self.model()
        optimizer = torch.optim.AdamW(model.parameters(), _LEARNING_RATE, weight_decay=0.01)
        steps = EPOCHS * -(-len(texts) // BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(EPOCHS):
            for picked in torch.randperm(len(texts), generator=generator).split(BATCH_SIZE):
                optimizer.zero_grad()
                self.loss(model, texts[picked]).mean().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                on_step(model, optimizer)
                schedule.step()
        return model

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        path = self.directory / "tokenizer.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda temporary: byte_pairs(_text("validation")).save(str(temporary)))
        return Tokenizer.from_file(str(path))

    @cached_property
    def _drawn(self) -> Tensor:
        """The texts, then the queries, int64 [texts + queries, 64]."""
        texts = self._tokens("test")
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
        return texts[order[: self._texts + self._queries]]

    def _tokens(self, split: str) -> Tensor:
        """A file cut into texts, int64 [texts, 64]; the rest of the file is left out."""
        tokens = torch.tensor(self.tokenizer.encode(_text(split)).ids)
        return tokens[: len(tokens) // TOKENS * TOKENS].view(-1, TOKENS)

    @cached_property
    def _start(self) -> dict[str, Tensor]:
        """The weights that training starts from, by name."""
        path = self.directory / "start.safetensors"
        if not path.exists():
            weights = self._pretrained().state_dict()
            write_whole(path, lambda temporary: save_file(weights, temporary))
        return load_file(path)

    def _pretrained(self) -> nn.Module:
        """AdamW with a learning rate that rises and falls."""
        texts = self._tokens("validation")[: self._pretraining_texts]
        model, generator = gpt2(), torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
        steps = _PRETRAINING_EPOCHS * -(-len(texts) // _PRETRAINING_BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PRETRAINING_RATE, total_steps=steps + 1)
        for _ in range(_PRETRAINING_EPOCHS):
            for picked in torch.randperm(len(texts), generator=generator).split(_PRETRAINING_BATCH):
                optimizer.zero_grad()
                self.loss(model, texts[picked]).mean().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
        return model


def gpt2() -> nn.Module:
    """Random weights, always the same."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(tie_word_embeddings=False, **_SHAPE, **_NO_DROPOUT))


def byte_pairs(text: str) -> Tokenizer:
    """A vocabulary of byte pairs, from a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def _text(split: str) -> str:
    return gzip.decompress(data_file(f"wikitext2-{split}.txt.gz").read_bytes()).decode()


WIKITEXT2 = Wikitext2()
