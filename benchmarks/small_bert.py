"""A small BERT with random weights that classifies texts, for `benchmarks.glue`.

2 layers x 128, a vocabulary of 4,000 word pieces, 96 positions, no dropout: 943,000 weights. It was not pretrained:
after eight epochs of masked words, on 1.4 million tokens, it learned SST-2 worse than from random weights.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

VOCABULARY, LONGEST = 4_000, 96
_SHAPE = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def saved_classifier(path: Path, texts: list[str], classes: tuple[str, str]) -> Path:
    """A directory with the model and a tokenizer of the texts; made, always the same, unless it is there."""
    if not path.exists():
        tokenizer = word_pieces(texts)
        model = bert(tokenizer, classes)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
            made.rename(path)
    return path


def word_pieces(texts: list[str]) -> PreTrainedTokenizerFast:
    """BERT's kind of tokenizer, uncased, with a vocabulary from the texts."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordPiece(unk_token=_SPECIAL["unk_token"]))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = list(_SPECIAL.values())
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    first, last = ((_SPECIAL[name], backend.token_to_id(_SPECIAL[name])) for name in ("cls_token", "sep_token"))
    backend.post_processor = processors.BertProcessing(last, first)
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    options = {"tokenizer_object": backend, "model_max_length": LONGEST, "model_input_names": inputs}
    return PreTrainedTokenizerFast(**options, **_SPECIAL)


def bert(tokenizer: PreTrainedTokenizerFast, classes: tuple[str, str]) -> BertForSequenceClassification:
    """Random weights, always the same."""
    from transformers import BertConfig, BertForSequenceClassification

    names = {"id2label": dict(enumerate(classes)), "label2id": {name: number for number, name in enumerate(classes)}}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": LONGEST, "pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(**sizes, **names, **_SHAPE, **_NO_DROPOUT))
