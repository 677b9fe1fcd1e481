"""Families of transformers for `benchmarks.models`: 4 layers x 128, trained whole or by adapters, padded batches."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.model_kinds import CLASSES, IMAGE, Kind, padded, sentences, token_loss

VOCABULARY = 8000
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHAPE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512, **_IDS}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BERT = {**_SHAPE, **_NO_DROPOUT, "num_labels": CLASSES}
_LLAMA = {**_SHAPE, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 384}
_GPT2 = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 64, **_IDS}
_GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_DISTIL = {"dim": 128, "n_layers": 4, "n_heads": 4, "hidden_dim": 512, "dropout": 0.0, "attention_dropout": 0.0}
_T5 = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0, **_IDS}
_VIT = {**_SHAPE, **_NO_DROPOUT, "image_size": 32, "patch_size": 4, "num_labels": CLASSES}


def made(family: str, head: str, vocabulary: int = VOCABULARY, **options: Any) -> nn.Module:
    """A model of transformers, by the names of its configuration and of its class."""
    import transformers

    text_config = f"{family}TextConfig"  # of families that read images as well
    config = getattr(transformers, text_config if hasattr(transformers, text_config) else f"{family}Config")
    return getattr(transformers, f"{family}{head}")(config(vocab_size=vocabulary, **options))  # type: ignore[no-any-return]


def adapted(kind: str, targets: list[str], family: str, head: str, **options: Any) -> nn.Module:
    """The same with LoRA or DoRA of rank 8 by peft; all else is frozen."""
    import peft

    config = peft.LoraConfig(r=8, target_modules=targets, use_dora=kind == "DoRA", task_type="CAUSAL_LM")
    return peft.get_peft_model(made(family, head, **options), config)  # type: ignore[no-any-return, arg-type]


def outputs(m: nn.Module, x: Tensor, **more: Any) -> Tensor:
    return m(input_ids=x, attention_mask=(x != 0).long(), **more).logits  # type: ignore[no-any-return]


def classify(m: nn.Module, b: Any) -> Tensor:
    return F.cross_entropy(outputs(m, b[0]), b[1], reduction="none")


def causal(m: nn.Module, b: Any) -> Tensor:
    return token_loss(outputs(m, b[0], use_cache=False), b[0])


def masked(m: nn.Module, b: Any) -> Tensor:
    """Every seventh token is hidden and predicted."""
    chosen = (torch.arange(b[0].shape[1]) % 7 == 1) & (b[0] != 0)
    logits = outputs(m, b[0].masked_fill(chosen, 3))
    losses = F.cross_entropy(logits.flatten(0, 1), b[0].flatten(), reduction="none").view_as(chosen) * chosen
    return losses.sum(1) / chosen.sum(1)


def repeated(m: nn.Module, b: Any) -> Tensor:
    """The source is the target."""
    mask = (b[0] != 0).long()
    return token_loss(outputs(m, b[0], decoder_input_ids=b[0], decoder_attention_mask=mask, use_cache=False), b[0])


def images(m: nn.Module, b: Any) -> Tensor:
    return F.cross_entropy(m(pixel_values=b[0]).logits, b[1], reduction="none")


def kind(name: str, make: Any, loss: Any, vocabulary: int = VOCABULARY, needs: str = "transformers") -> Kind:
    size = f"4 layers x 128, vocabulary {vocabulary:,}"
    return Kind(name, size, make, sentences(vocabulary, 32, 64), loss, padded, needs=needs)


def family(name: str, head: str, loss: Any, vocabulary: int = VOCABULARY, **options: Any) -> Any:
    return partial(made, name, head, vocabulary, **options), loss, vocabulary


KINDS = [
    kind("BERT, classes", *family("Bert", "ForSequenceClassification", classify, 30_000, **_BERT)),
    kind("BERT, masked tokens, tied", *family("Bert", "ForMaskedLM", masked, **_BERT)),
    kind("DistilBERT, classes",
         *family("DistilBert", "ForSequenceClassification", classify, num_labels=CLASSES, **_DISTIL, **_IDS)),
    kind("RoBERTa, classes", *family("Roberta", "ForSequenceClassification", classify, **_BERT)),
    kind("GPT-2, tied", *family("GPT2", "LMHeadModel", causal, **_GPT2)),
    kind("GPT-2, tied", *family("GPT2", "LMHeadModel", causal, 30_000, **_GPT2)),
    kind("GPT-2, untied", *family("GPT2", "LMHeadModel", causal, tie_word_embeddings=False, **_GPT2)),
    kind("GPT-NeoX", *family("GPTNeoX", "ForCausalLM", causal, **_SHAPE)),
    kind("Llama", *family("Llama", "ForCausalLM", causal, **_LLAMA)),
    kind("Mistral", *family("Mistral", "ForCausalLM", causal, **_LLAMA)),
    kind("Gemma 2, tied", *family("Gemma2", "ForCausalLM", causal, **_LLAMA)),
    kind("Gemma 3, tied", *family("Gemma3", "ForCausalLM", causal, **_LLAMA)),
    kind("Qwen 2", *family("Qwen2", "ForCausalLM", causal, **_LLAMA)),
    kind("Qwen 3", *family("Qwen3", "ForCausalLM", causal, **_LLAMA)),
    kind("Mixtral, 4 experts", *family("Mixtral", "ForCausalLM", causal, num_local_experts=4, **_LLAMA)),
    kind("T5, tied", *family("T5", "ForConditionalGeneration", repeated, **_T5)),
    Kind("ViT of transformers", "4 layers x 128, 65 tokens", partial(made, "ViT", "ForImageClassification", **_VIT),
         IMAGE, images, needs="transformers"),
    kind("GPT-2, LoRA", partial(adapted, "LoRA", ["c_attn", "c_proj", "c_fc"], "GPT2", "LMHeadModel", **_GPT2), causal,
         needs="peft"),
    kind("Llama, LoRA", partial(adapted, "LoRA", ["q_proj", "v_proj"], "Llama", "ForCausalLM", **_LLAMA), causal,
         needs="peft"),
    kind("Llama, DoRA", partial(adapted, "DoRA", ["q_proj", "v_proj"], "Llama", "ForCausalLM", **_LLAMA), causal,
         needs="peft"),
]  # fmt: skip
