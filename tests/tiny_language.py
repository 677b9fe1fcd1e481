"""Tiny models of language, a tokenizer of words, and texts; for tests that need transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

_ANIMALS, _PLACES, _DEEDS = (
    ["cat", "dog", "bird", "fish"],
    ["house", "river", "tree", "hill"],
    ["sees", "likes", "fears"],
)
_WORDS = [
    *_ANIMALS,
    *_PLACES,
    *_DEEDS,
    *["the", "at", "a", "of", "user", "assistant", "who", "?", ".", ":", "film", "good", "bad", "dull", "fine"],
]
CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def tokenizer() -> Any:
    """Byte pairs of the tests' words, with a chat template."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = ["<pad>", "<unk>", "<s>", "</s>", "<user>", "<assistant>", "<end>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=350, special_tokens=special, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([" ".join(texts(200)), " ".join(_WORDS)], trainer)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = CHAT
    return made


def texts(count: int, seed: int = 0) -> list[str]:
    """Of different lengths."""
    chance = random.Random(seed)
    sentence = lambda: (  # noqa: E731
        f"the {chance.choice(_ANIMALS)} at the {chance.choice(_PLACES)} {chance.choice(_DEEDS)} a "
        f"{chance.choice(_ANIMALS)} ."
    )
    return [" ".join(sentence() for _ in range(chance.randint(1, 3))) for _ in range(count)]


def gpt2(vocabulary: int, seed: int = 0, **options: Any) -> Any:
    """With a tied embedding, unless told otherwise."""
    torch.manual_seed(seed)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=vocabulary, **shape, **_IDS, **options))


def llama(vocabulary: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, **_IDS,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def t5(vocabulary: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=3,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bert(head: str, vocabulary: int, seed: int = 0, **options: Any) -> Any:
    """head: the end of the class's name, as ForSequenceClassification"""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=vocabulary, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **_IDS, **options,
    )  # fmt: skip
    return getattr(transformers, f"Bert{head}")(config)


def saved(model: nn.Module, directory: Path, **options: Any) -> Path:
    """A model's directory, with the tokenizer."""
    model.save_pretrained(directory, **options)  # type: ignore[operator]
    tokenizer().save_pretrained(directory)
    return directory


def json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def trained(model: nn.Module, rows: list[str], out: Path, **arguments: Any) -> Path:
    """The output directory of a Trainer after a few steps on texts."""
    pytest.importorskip("accelerate", reason="accelerate is not installed, which the Trainer needs")
    words = tokenizer()
    settings = {
        "max_steps": 6, "save_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "use_cpu": True, "report_to": [],
        "per_device_train_batch_size": 8, "disable_tqdm": True, **arguments,
    }  # fmt: skip
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(str(out), **settings),
        train_dataset=[words(text) for text in rows],
        data_collator=transformers.DataCollatorForLanguageModeling(words, mlm=False),
        processing_class=words,
    )
    trainer.train()
    return out
