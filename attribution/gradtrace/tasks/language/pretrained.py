"""Hugging Face models, adapters and tokenizers, read from directories of this machine alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from gradtrace.errors import TaskError
from gradtrace.tasks.language.optional import imported
from gradtrace.tasks.language.options import DType, Kind
from gradtrace.tasks.payload import listed

_CONFIG, _ADAPTER_CONFIG = "config.json", "adapter_config.json"
_TOKENIZER_FILES = ("tokenizer*.json", "vocab*", "*.model")
_TRAINER_FILES = ("trainer_state.json", "training_args.bin", "checkpoint-*/trainer_state.json")
_AUTO_CLASSES: dict[Kind, str] = {
    "CausalLM": "AutoModelForCausalLM",
    "SequenceToSequence": "AutoModelForSeq2SeqLM",
    "SequenceClassification": "AutoModelForSequenceClassification",
    "TokenClassification": "AutoModelForTokenClassification",
}
_ENDINGS: dict[str, Kind] = {  # of classes' names in a configuration
    "ForCausalLM": "CausalLM",
    "LMHeadModel": "CausalLM",
    "ForConditionalGeneration": "SequenceToSequence",
    "ForSequenceClassification": "SequenceClassification",
    "ForTokenClassification": "TokenClassification",
}
_TASK_TYPES: dict[str, Kind] = {  # of PEFT
    "CAUSAL_LM": "CausalLM",
    "SEQ_2_SEQ_LM": "SequenceToSequence",
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
}


class Pretrained:
    """A model in a directory: a Hugging Face model, a PEFT adapter, or the newest one of a Trainer's checkpoints.

    directory: also a Trainer's output, whose checkpoints are in folders checkpoint-STEP
    base: of an adapter's base model, in place of the one that the adapter names
    tokenizer: in place of the one beside the model

    Raises:
        TaskError: the directory holds neither.
    """

    def __init__(self, directory: Path, base: Path | None = None, tokenizer: Path | None = None) -> None:
        self._given, self.directory = directory, _model_directory(directory)
        self._base, self._tokenizer = base, tokenizer
        self.is_adapter = (self.directory / _ADAPTER_CONFIG).is_file()

    @cached_property
    def kind(self) -> Kind | None:
        """By the configuration; None if it names no model of these kinds."""
        if self.is_adapter:
            return _TASK_TYPES.get(_json(self.directory / _ADAPTER_CONFIG).get("task_type") or "")
        names = _json(self.directory / _CONFIG).get("architectures") or []
        return next((kind for name in names for ending, kind in _ENDINGS.items() if name.endswith(ending)), None)

    @property
    def base_directory(self) -> Path | str:
        """Of the model itself; of an adapter, that of its base model, or the base's name in Hugging Face's cache."""
        if not self.is_adapter:
            return self.directory
        if self._base is not None:
            return self._base
        name: str = _json(self.directory / _ADAPTER_CONFIG).get("base_model_name_or_path") or ""
        if not name:
            raise TaskError(f"{self.directory} names no base model; give its directory as base_model (--base-model)")
        return name

    @cached_property
    def is_trainers(self) -> bool:
        """Whether transformers' Trainer, or one that is made from it, wrote the directory."""
        return any(any(self._given.glob(pattern)) for pattern in _TRAINER_FILES)

    def config(self) -> Any:
        """The model's configuration; of an adapter, its base model's."""
        transformers = imported("transformers")
        try:
            return transformers.AutoConfig.from_pretrained(str(self.base_directory), local_files_only=True)
        except (OSError, ValueError) as error:
            raise self._unreadable("a model", error) from error

    def parameter_count(self, kind: Kind) -> int:
        """Of the model or, of an adapter, its base model. No weights are loaded."""
        auto = getattr(imported("transformers"), _AUTO_CLASSES[kind])
        with torch.device("meta"):
            model: nn.Module = auto.from_config(self.config())
        return sum(parameter.numel() for parameter in model.parameters())

    def model(self, kind: Kind, dtype: DType) -> nn.Module:
        """With the weights of the directory, in `dtype`; adapters stay in float32, as PEFT trains them.

        Raises:
            TaskError: transformers or peft cannot read it.
            MissingLibraryError: one of them is not installed.
        """
        transformers = imported("transformers")
        auto = getattr(transformers, _AUTO_CLASSES[kind])
        try:
            with _without_progress_bars(transformers):
                model: nn.Module = auto.from_pretrained(
                    str(self.base_directory), local_files_only=True, dtype=getattr(torch, dtype), **self._head()
                )
                if self.is_adapter:
                    model = self._with_adapter(model)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unreadable(_AUTO_CLASSES[kind], error) from error
        return share_frozen(model.float() if dtype == "float32" else model)

    def tokenizer(self) -> Any:
        """Raises TaskError if there is none, or only one that does not tell where in the text its tokens are."""
        places = [self._tokenizer] if self._tokenizer else [self.directory, self.directory.parent, self.base_directory]
        auto, problems = imported("transformers").AutoTokenizer, []
        for place in places:
            if Path(place).is_dir() and not any(any(Path(place).glob(pattern)) for pattern in _TOKENIZER_FILES):
                problems.append(f"{place}: no file of a tokenizer")  # transformers would make an empty one
                continue
            try:
                tokenizer = auto.from_pretrained(str(place), local_files_only=True)
            except (OSError, ValueError, KeyError) as error:
                problems.append(f"{place}: {str(error).splitlines()[0]}")
                continue
            if not tokenizer.is_fast:
                raise TaskError(f"{place} has a slow tokenizer; save the fast one there (tokenizer.json)")
            tokenizer("")  # takes back a truncation and a padding that were saved with it; later calls change nothing
            return tokenizer
        raise TaskError(
            f"no tokenizer was read ({listed(problems)}); save it there by tokenizer.save_pretrained, or give its "
            "directory as tokenizer (--tokenizer)"
        )

    def _unreadable(self, wanted: str, error: Exception) -> TaskError:
        remedy = "; give the directory of its base model as base_model (--base-model)" if self.is_adapter else ""
        return TaskError(f"{self.directory} cannot be read as {wanted}: {error}{remedy}")

    def _head(self) -> dict[str, Any]:
        """The number of classes, where an adapter brings the classifier and its base model does not know it."""
        file = self.directory / "adapter_model.safetensors"
        if self.kind not in ("SequenceClassification", "TokenClassification") or not file.is_file():
            return {}
        saved = _json(self.directory / _ADAPTER_CONFIG).get("modules_to_save") or []
        with safe_open(file, "pt") as weights:
            heads = [name for name in weights.keys() if any(f".{head}." in name for head in saved)]  # noqa: SIM118
            matrices = [name for name in heads if name.endswith(".weight")]
            sizes = [weights.get_slice(name).get_shape()[0] for name in matrices]
        return {"num_labels": min(sizes)} if sizes else {}

    def _with_adapter(self, model: nn.Module) -> nn.Module:
        """With the adapter's weights trainable, and all others frozen."""
        options = {"is_trainable": True, "local_files_only": True}
        adapted: nn.Module = imported("peft").PeftModel.from_pretrained(model, str(self.directory), **options)
        return adapted


class SharedParameter(nn.Parameter):
    """A frozen parameter that copies of a model share: its memory is taken once."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedParameter:
        memo[id(self)] = alias = SharedParameter(self.data, requires_grad=False)
        return alias


def share_frozen(model: nn.Module) -> nn.Module:
    """The model, with its frozen parameters shared by all copies of it. Each checkpoint is loaded into a copy."""
    shared = {id(p): SharedParameter(p.data, requires_grad=False) for p in model.parameters() if not p.requires_grad}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in shared:
                setattr(module, name, shared[id(parameter)])
    return model


@contextmanager
def _without_progress_bars(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _model_directory(directory: Path) -> Path:
    if not directory.is_dir():
        raise TaskError(f"there is no directory {directory}; give that of a Hugging Face model or PEFT adapter")
    checkpoints = sorted(directory.glob("checkpoint-*"), key=_step)
    for path in [directory, *reversed(checkpoints)]:
        if any((path / name).is_file() for name in (_ADAPTER_CONFIG, _CONFIG)):
            return path
    raise TaskError(
        f"{directory} holds no {_CONFIG} and no {_ADAPTER_CONFIG}, nor does a folder checkpoint-* in it; give the "
        "directory of a Hugging Face model or PEFT adapter, or the output directory of its Trainer"
    )


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
        if isinstance(content, dict):
            return content
    except (OSError, ValueError):
        pass
    raise TaskError(f"{path} is damaged; restore the file that the model was saved with")
