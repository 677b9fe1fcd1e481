"""Train a small GPT-2 on paragraphs of WikiText-2 with transformers' Trainer: a minute and a half on two cores.

Leaves what a training with the Trainer leaves: a model's directory with a tokenizer and checkpoints, `model`, and the
rows as JSON lines, `train.jsonl` and `query.jsonl`. No Python file is needed for the rest:

    gradtrace build --model runs/wikitext/model --data runs/wikitext/train.jsonl \\
        --query-data runs/wikitext/query.jsonl --out runs/wikitext/index
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from gradtrace.tasks import data_file

VOCABULARY, LENGTH = 4_000, 96
END = "<|endoftext|>"
FEWEST_WORDS = 40  # of a paragraph that is a row
EVERY = 12  # so many paragraphs apart, one is for questions and is not trained on


def train(out: Path, rows: int = 2_000, epochs: int = 6, seed: int = 0) -> None:
    """rows: at most"""
    set_seed(seed)
    chosen = paragraphs()
    queries, texts = chosen[::EVERY], [text for number, text in enumerate(chosen) if number % EVERY][:rows]
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / "train.jsonl", texts)
    write_rows(out / "query.jsonl", queries)
    tokenizer = byte_pairs(texts)
    trainer = Trainer(
        gpt2(tokenizer),
        TrainingArguments(
            str(out / "model"),
            num_train_epochs=epochs,
            save_strategy="epoch",
            save_total_limit=3,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            warmup_steps=50,
            weight_decay=0.01,
            logging_steps=100,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=[tokenizer(text, truncation=True, max_length=LENGTH) for text in texts],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


def paragraphs() -> list[str]:
    """Of the test articles, in their order; headings and short ones are left out."""
    lines = gzip.decompress(data_file("wikitext2-test.txt.gz").read_bytes()).decode().splitlines()
    return [line.strip() for line in lines if len(line.split()) >= FEWEST_WORDS and not line.startswith(" =")]


def write_rows(path: Path, texts: Iterable[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")


def byte_pairs(texts: list[str]) -> Any:
    """A tokenizer of byte pairs that are frequent in the texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    ends = {"bos_token": END, "eos_token": END, "pad_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=LENGTH, **ends)


def gpt2(tokenizer: Any) -> GPT2LMHeadModel:
    end = tokenizer.eos_token_id
    shape = {"n_layer": 2, "n_embd": 128, "n_head": 4, "n_positions": LENGTH}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **shape, **no_dropout)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/wikitext"))
    train(parser.parse_args().out)
