"""Adapters of the peft library on models of PyTorch and of transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from zoo.case import ZooTask, right
from zoo.data import VOCABULARY, labelled, lengths, mlp, next_token_loss, pad, texts

ROWS = labelled(6)
LINEAR = ["c_attn", "c_proj", "c_fc"]


def adapted(model: nn.Module, kind: str, **options: Any) -> nn.Module:
    """The model with adapters of this configuration class; all else is frozen."""
    import peft

    return peft.get_peft_model(model, getattr(peft, kind)(**options))  # type: ignore[no-any-return, no-untyped-call]


def gpt2() -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=8, n_layer=2, n_head=2, n_positions=24, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return, no-untyped-call]


def token_loss(m: nn.Module, b: Any) -> Tensor:
    x: Tensor = b[0]
    out = m(input_ids=x, attention_mask=(x != 0).long(), use_cache=False)
    return next_token_loss(out.logits[:, -x.shape[1] :], x)


for name, options in {
    "lora": {"r": 2},
    "lora_by_rank": {"r": 2, "use_rslora": True, "lora_dropout": 0.1, "bias": "all"},
    "dora": {"r": 2, "use_dora": True},
}.items():
    right(f"peft_{name}_of_an_mlp", needs="peft")(
        partial(
            lambda options: ZooTask(lambda: adapted(mlp(), "LoraConfig", target_modules=["0", "2"], **options), ROWS),
            options,
        )
    )

for name, (kind, options) in {
    "lora": ("LoraConfig", {"r": 2, "target_modules": LINEAR, "fan_in_fan_out": True}),
    "lora_and_a_trained_head": ("LoraConfig", {"r": 2, "target_modules": LINEAR, "modules_to_save": ["ln_f"]}),
    "dora": ("LoraConfig", {"r": 2, "target_modules": LINEAR, "use_dora": True, "fan_in_fan_out": True}),
    "lora_of_embeddings": ("LoraConfig", {"r": 2, "target_modules": ["wte", "wpe", "c_attn"]}),
    "ia3": ("IA3Config", {"target_modules": LINEAR, "feedforward_modules": ["c_fc"], "fan_in_fan_out": True}),
    "prompt_tuning": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "prefix_tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 6}),
}.items():
    alike = name in ("lora_and_a_trained_head", "dora", "p_tuning")  # like LoRA, DoRA of an MLP, and prompt tuning
    right(f"peft_{name}_of_gpt2", needs="peft", long=alike)(
        partial(
            lambda kind, options: ZooTask(
                lambda: adapted(gpt2(), kind, task_type="CAUSAL_LM", **options), texts(lengths(4)), token_loss, pad
            ),
            kind,
            options,
        )
    )


def checkpointed() -> nn.Module:
    """The usual set-up of fine-tuning: adapters, gradient checkpointing, and inputs that require a gradient."""
    model = adapted(gpt2(), "LoraConfig", r=2, target_modules=LINEAR, task_type="CAUSAL_LM", fan_in_fan_out=True)
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    model.enable_input_require_grads()  # type: ignore[operator]
    return model


@right("peft_lora_with_gradient_checkpointing", needs="peft")
def lora_with_gradient_checkpointing() -> ZooTask:
    return ZooTask(checkpointed, texts(lengths(4)), token_loss, pad)
