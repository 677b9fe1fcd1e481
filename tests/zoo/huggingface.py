"""Families of transformers, tiny, trained whole on padded batches with attention masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import DEPENDS, ZooTask, refused, right
from zoo.data import VOCABULARY, labelled, lengths, next_token_loss, pad, texts

_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, **_IDS}
_LLAMA = {**_BERT, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 32}
_GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32, **_IDS}
_DISTIL = {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, **_IDS}
_T5 = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0, **_IDS}
_BART = {
    "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "decoder_start_token_id": 2, "max_position_embeddings": 32, **_IDS,
}  # fmt: skip
_VIT = {**_BERT, "image_size": 8, "patch_size": 4, "num_channels": 3, "num_labels": 3}


def made(family: str, head: str, attention: str, **options: Any) -> nn.Module:
    """A model of transformers by the names of its configuration and of its class."""
    import transformers

    text_config = f"{family}TextConfig"  # of families that read images as well
    config = getattr(transformers, text_config if hasattr(transformers, text_config) else f"{family}Config")(**options)
    config._attn_implementation = attention
    return getattr(transformers, f"{family}{head}")(config)  # type: ignore[no-any-return]


def outputs(m: nn.Module, x: Tensor, **more: Any) -> Tensor:
    return m(input_ids=x, attention_mask=(x != 0).long(), **more).logits  # type: ignore[no-any-return]


def class_loss(m: nn.Module, b: Any) -> Tensor:
    return F.cross_entropy(outputs(m, b[0]), b[1], reduction="none")


def token_class_loss(m: nn.Module, b: Any) -> Tensor:
    """Every token has the class of its number modulo 3; padding is left out of the mean."""
    keep = (b[0] != 0).float()
    losses = F.cross_entropy(outputs(m, b[0]).transpose(1, 2), b[0] % 3, reduction="none") * keep
    return losses.sum(1) / keep.sum(1)


def causal_loss(m: nn.Module, b: Any, summed: bool = False) -> Tensor:
    return next_token_loss(outputs(m, b[0], use_cache=False), b[0], summed)


def masked_loss(m: nn.Module, b: Any) -> Tensor:
    """Every third token is hidden and predicted."""
    chosen = (torch.arange(b[0].shape[1]) % 3 == 1) & (b[0] != 0)
    losses = F.cross_entropy(outputs(m, b[0].masked_fill(chosen, 3)).transpose(1, 2), b[0], reduction="none") * chosen
    return losses.sum(1) / chosen.sum(1)


def translation_loss(m: nn.Module, b: Any) -> Tensor:
    source, target = b
    seen = F.pad(target[:, 1:] != 0, (1, 0), value=True)  # the first token of a target may be 0
    return next_token_loss(outputs(m, source, decoder_input_ids=target, decoder_attention_mask=seen.long()), target)


def with_targets(examples: list[Any]) -> tuple[Tensor, Tensor]:
    """The source backwards, after a first token, is the target; both padded on the right."""
    targets = [(F.pad(x.flip(0), (1, 0)), y) for x, y in examples]
    return pad(examples)[0], pad(targets)[0]


def left(examples: list[Any]) -> tuple[Tensor, Tensor]:
    """Padded on the left, as for generation."""
    x, y = pad([(e[0].flip(0), e[1]) for e in examples])
    return x.flip(1), y


def left_loss(m: nn.Module, b: Any, numbered: bool = True) -> Tensor:
    """Causal, of all tokens but the first. `numbered`: positions count from the first token that is no padding."""
    x = b[0]
    places = ((x != 0).cumsum(1) - 1).clamp(min=0) if numbered else None
    logits = outputs(m, x, position_ids=places, use_cache=False)
    keep = (x[:, :-1] != 0).float()
    return (F.cross_entropy(logits[:, :-1].transpose(1, 2), x[:, 1:], reduction="none") * keep).sum(1) / keep.sum(1)


TEXTS = texts(lengths(4, rows=24))

Family = tuple[str, str, dict[str, Any], Callable[..., Tensor]]
FAMILIES: dict[str, Family] = {
    "bert_classes": (
        "Bert", "ForSequenceClassification", {**_BERT, "num_hidden_layers": 2, "num_labels": 3}, class_loss
    ),
    "bert_token_classes": ("Bert", "ForTokenClassification", {**_BERT, "num_labels": 3}, token_class_loss),
    "bert_masked_tokens": ("Bert", "ForMaskedLM", _BERT, masked_loss),
    "distilbert_classes": ("DistilBert", "ForSequenceClassification", {**_DISTIL, "num_labels": 3}, class_loss),
    "roberta_classes": ("Roberta", "ForSequenceClassification", {**_BERT, "num_labels": 3}, class_loss),
    "electra_classes": ("Electra", "ForSequenceClassification", {**_BERT, "num_labels": 3}, class_loss),
    "gpt2_tied": ("GPT2", "LMHeadModel", {**_GPT2, "n_layer": 2}, causal_loss),
    "gpt2_untied": ("GPT2", "LMHeadModel", {**_GPT2, "tie_word_embeddings": False}, causal_loss),
    "gpt2_tied_summed": ("GPT2", "LMHeadModel", _GPT2, partial(causal_loss, summed=True)),
    "gpt2_classes": ("GPT2", "ForSequenceClassification", {**_GPT2, "num_labels": 3}, class_loss),
    "gpt_neox": ("GPTNeoX", "ForCausalLM", _BERT, causal_loss),
    "llama": ("Llama", "ForCausalLM", {**_LLAMA, "num_hidden_layers": 2}, causal_loss),
    "llama_tied_summed": (
        "Llama", "ForCausalLM", {**_LLAMA, "tie_word_embeddings": True}, partial(causal_loss, summed=True)
    ),
    "llama_classes": ("Llama", "ForSequenceClassification", {**_LLAMA, "num_labels": 3}, class_loss),
    "mistral": ("Mistral", "ForCausalLM", {**_LLAMA, "sliding_window": 4}, causal_loss),
    "gemma": ("Gemma", "ForCausalLM", _LLAMA, causal_loss),
    "gemma2": ("Gemma2", "ForCausalLM", {**_LLAMA, "sliding_window": 4, "num_hidden_layers": 2}, causal_loss),
    "gemma3": ("Gemma3", "ForCausalLM", {**_LLAMA, "sliding_window": 4, "num_hidden_layers": 2}, causal_loss),
    "qwen2": ("Qwen2", "ForCausalLM", _LLAMA, causal_loss),
    "qwen3": ("Qwen3", "ForCausalLM", _LLAMA, causal_loss),
    "mixtral": ("Mixtral", "ForCausalLM", {**_LLAMA, "num_local_experts": 3}, causal_loss),
    "t5_tied": ("T5", "ForConditionalGeneration", _T5, translation_loss),
    "t5_gated": (
        "T5", "ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        translation_loss,
    ),
    "bart": ("Bart", "ForConditionalGeneration", _BART, translation_loss),
}  # fmt: skip

ROTATED = ("bert_classes_sdpa", "gpt2_tied_sdpa", "llama_eager", "mixtral_sdpa", "t5_tied_eager")
# The others are like one of these: in the layers that it has, or in where its padding lies.
UNLIKE = (*ROTATED, "bert_masked_tokens_sdpa", "gpt_neox_sdpa", "gemma3_sdpa")

for name, (family, head, options, loss) in FAMILIES.items():
    for attention in ("sdpa", "eager") if name != "gemma2" else ("eager",):
        key = f"{name}_{attention}"
        right(key, needs="transformers", rotates=key in ROTATED, long=key not in UNLIKE)(
            partial(
                lambda make, loss: ZooTask(make, TEXTS, loss, with_targets if loss is translation_loss else pad),
                partial(made, family, head, attention, **options),
                loss,
            )
        )


def padded_left(name: str, numbered: bool) -> ZooTask:
    family, head, options, _ = FAMILIES[name]
    rows = texts(lengths(4, rows=24, first=(6, 6)))
    return ZooTask(partial(made, family, head, "sdpa", **options), rows, partial(left_loss, numbered=numbered), left)


for name in ("gpt2_tied", "llama"):
    right(f"{name}_padded_on_the_left", needs="transformers")(partial(padded_left, name, True))

refused(DEPENDS, "position|pad|mask", name="gpt2_padded_on_the_left_without_positions", needs="transformers")(
    partial(padded_left, "gpt2_tied", False)
)


def image_loss(m: nn.Module, b: Any) -> Tensor:
    return F.cross_entropy(m(pixel_values=b[0]).logits, b[1], reduction="none")


for attention in ("sdpa", "eager"):
    right(f"vit_{attention}", needs="transformers", rotates=attention == "sdpa", long=attention == "eager")(
        partial(
            lambda attention: ZooTask(
                partial(made, "ViT", "ForImageClassification", attention, **_VIT),
                labelled(3, 8, 8, rows=24),
                image_loss,
            ),
            attention,
        )
    )


def checkpointed(family: str, head: str, options: dict[str, Any], reentrant: bool) -> nn.Module:
    model: Any = made(family, head, "sdpa", **options)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model  # type: ignore[no-any-return]


for reentrant in (True, False):
    name = f"llama_checkpointed_{'reentrant' if reentrant else 'not_reentrant'}"
    right(name, needs="transformers", long=not reentrant)(
        partial(
            lambda reentrant: ZooTask(
                partial(checkpointed, "Llama", "ForCausalLM", _LLAMA, reentrant), TEXTS, causal_loss, pad
            ),
            reentrant,
        )
    )
