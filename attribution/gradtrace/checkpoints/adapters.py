"""Checkpoints of PEFT, which hold an adapter's weights alone, under names that only PEFT translates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from gradtrace.checkpoints.weights import listing, read_state
from gradtrace.errors import CheckpointError, MissingLibraryError


def is_adapter(path: Path) -> bool:
    return (path / "adapter_config.json").is_file()


def load_adapter(model: nn.Module, path: Path) -> None:
    """Copy an adapter's weights into a model that has one, of the name "default".

    Raises:
        CheckpointError: the model has no adapter, or another one; it may then be changed in part.
        MissingLibraryError: peft is not installed.
    """
    try:
        from peft import set_peft_model_state_dict
    except ImportError as error:
        raise MissingLibraryError("peft", "hf") from error
    if not hasattr(model, "peft_config"):
        raise CheckpointError(
            f"{path} holds a PEFT adapter, and the task's model has none: return peft.PeftModel.from_pretrained(base, "
            "adapter, is_trainable=True) in Task.model"
        )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        result: Any = set_peft_model_state_dict(model, read_state(path))
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} does not fit the adapter of the task's model: {error}") from error
    wrong = {
        "missing": sorted(trained.intersection(result.missing_keys)),
        "unexpected": list(result.unexpected_keys),
    }
    if any(wrong.values()):
        text = "; ".join(f"{kind}: {listing(names)}" for kind, names in wrong.items() if names)
        raise CheckpointError(
            f"{path} does not fit the adapter of the task's model; give the one that was trained. {text}"
        )
