"""What a language task is made from; on the command line every field is a flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

TASK_FILE = "task.json"  # in an index that was built without a task of the user's

Kind = Literal["CausalLM", "SequenceToSequence", "SequenceClassification", "TokenClassification"]
LossOn = Literal["completion", "all"]
Reduction = Literal["mean", "sum"]
DType = Literal["float32", "bfloat16", "float16"]


class LanguageOptions(BaseModel):
    """How records become tokens and a loss."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    text: str | None = Field(None, description="Column of texts. Default: text.")
    text_pair: str | None = Field(None, description="Column of second texts, to classify pairs. Default: text_pair.")
    prompt: str | None = Field(None, description="Column of prompts. Default: prompt.")
    completion: str | None = Field(None, description="Column of completions. Default: completion.")
    messages: str | None = Field(
        None, description="Column of conversations, lists of {role, content}. Default: messages."
    )
    label: str | None = Field(None, description="Column of a classifier's labels. Default: label.")
    loss_on: LossOn | None = Field(
        None,
        description="Tokens that count in a CausalLM's loss: completion (of conversations, the assistant's turns) or "
        "all. Default: completion for prompts with completions, all for the rest.",
    )
    reduction: Reduction | None = Field(
        None,
        description="Loss of an example: mean or sum over its own tokens. Default: the sum for what transformers' "
        "Trainer or TRL trained, whose steps weight all tokens alike, else the mean.",
    )
    append_eos: bool | None = Field(
        None, description="End each sequence with the end-of-sequence token. Default: only completions."
    )
    representations: bool = Field(
        False,
        description="Index the last hidden state of each row's last token that counts, for repsim. Of models that "
        "write; classifiers' need no flag.",
    )
    max_length: int | None = Field(None, ge=2, description="Tokens kept of a row. Default: what the model takes.")
    dtype: DType = Field(
        "float32", description="Numbers that the model computes with. Gradients are summed in float32 always."
    )
    tokenizer: Path | None = Field(None, description="Directory of the tokenizer. Default: the model's.")
    base_model: Path | None = Field(None, description="Directory of an adapter's base model, if it was moved.")
    layers: list[str] | None = Field(
        None, description='Patterns of the attributed parameters\' names: "h.*", "!*.bias".'
    )


class _Directories(BaseModel):
    model: Path = Field(description="Directory of a Hugging Face model or PEFT adapter, or of its Trainer's output.")
    data: Path = Field(description="Training rows: .jsonl, .csv, .parquet, or a folder of datasets' save_to_disk.")
    query_data: Path | None = Field(None, description="Rows to ask about, in the same form.")
    kind: Kind | None = Field(None, description="Kind of task. Default: by the model's configuration.")


class TaskFile(LanguageOptions, _Directories):
    """A language task as a file: the kind of model, its directory, and the files of data."""

    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in LanguageOptions.model_fields}
