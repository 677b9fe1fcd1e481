"""What a model writes after a prompt, as an example to ask about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradtrace.errors import DatasetError, QueryError
from gradtrace.task import Example
from gradtrace.tasks.language.optional import imported
from gradtrace.tasks.language.questions import WritingTask

Prompt = str | Sequence[Mapping[str, str]]  # a text, or messages
Ended = Literal["end", "length", "time"]

_LEAST = 1e-300  # of a uniform number whose logarithm is taken


@dataclass(frozen=True, slots=True)
class Completion:
    """
    text: without special tokens
    tokens: their texts, with that of the end if the model wrote it; a question's `only` counts these from 0
    payload: the request that asks why the model wrote this
    ended: by the end-of-sequence token, or because no more tokens or seconds were left
    """

    text: str
    tokens: list[str]
    payload: dict[str, Any]
    ended: Ended


def complete(
    task: WritingTask,
    model: nn.Module,
    prompt: Prompt,
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    seconds: float,
) -> Completion:
    """What transformers' `generate` makes with the model's own settings, such as penalties.

    Args:
        temperature: divides the logits of which tokens are drawn; 0: the most probable token each time.
        seed: of the draws. The same gives the same completion.
        seconds: after which no further token is written.

    Raises:
        QueryError: the prompt cannot be read, or leaves no room for so many tokens.
    """
    given = _prompt_ids(task, prompt, max_tokens)
    device = next(model.parameters()).device
    inputs = {"input_ids": given[None].to(device), "attention_mask": torch.ones_like(given)[None].to(device)}
    options: dict[str, Any] = {"max_new_tokens": max_tokens, "max_time": seconds, "do_sample": False, "num_beams": 1}
    if temperature:
        options["logits_processor"] = imported("transformers").LogitsProcessorList([_Draws(temperature, seed)])
    with torch.no_grad():
        (generated,) = model.generate(**inputs, **options, pad_token_id=task.pad_id).cpu()  # type: ignore[operator]
    ids, example = task.written(given, generated)
    return Completion(
        text := _continued(task, given, ids),
        task.encoder.texts(ids),
        _payload(task, prompt, text, len(ids), example),
        "end" if _is_end(model, ids) else "length" if len(ids) >= max_tokens else "time",
    )


def _prompt_ids(task: WritingTask, prompt: Prompt, max_tokens: int) -> Tensor:
    try:
        given = task.prompt_ids(prompt)
    except (DatasetError, TypeError, KeyError, ValueError) as error:
        raise QueryError(f"this is not a prompt of {type(task).__name__}: {error}") from error
    if not len(given):
        raise QueryError("the prompt is empty, and the tokenizer has no token to begin with; give some text")
    room = task.room(given)
    if max_tokens > room:
        raise QueryError(
            f"the prompt's {len(given)} tokens leave room for {max(room, 0)} more; ask for no more, or shorten it"
        )
    return given


def _is_end(model: Any, ids: Tensor) -> bool:
    """Whether the last of the tokens is one after which the model writes no more."""
    ends = model.generation_config.eos_token_id  # None, one, or several
    return len(ids) > 0 and ends is not None and int(ids[-1]) in torch.as_tensor(ends).reshape(-1).tolist()


def _continued(task: WritingTask, given: Tensor, ids: Tensor) -> str:
    """The text of the tokens as it goes on after the prompt's: by themselves, some tokenizers leave out a space."""
    before = task.encoder.decode(given)
    whole = task.encoder.decode(torch.cat([given, ids]))
    return whole[len(before) :] if whole.startswith(before) else task.encoder.decode(ids)


def _payload(task: WritingTask, prompt: Prompt, text: str, count: int, written: Example) -> dict[str, Any]:
    """Prompt and completion, if they become the very tokens that the model wrote; else these.

    written: what the model wrote, of `count` tokens
    """
    completion: Any = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    payload = {"prompt": prompt, "completion": completion}
    try:
        example = task.example({task.column(name): value for name, value in payload.items()})
    except DatasetError:
        example = {"input_ids": torch.zeros(0), "labels": torch.zeros(0)}
    same = all(torch.equal(example[name][: len(ids)], ids) for name, ids in written.items())
    if not text or not same:
        return {name: ids.tolist() for name, ids in written.items()}
    more = len(example["labels"]) > len(written["labels"])  # the end, which the model did not write
    return payload | ({"only": list(range(count))} if more else {})


class _Draws:
    """Makes a token that is drawn the most probable one, by Gumbel's noise. The generator is its own: transformers
    draws by the global one, which threads share."""

    def __init__(self, temperature: float, seed: int) -> None:
        self._temperature, self._generator = temperature, torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.rand(scores.shape, generator=self._generator, dtype=torch.float64).clamp(min=_LEAST)
        return scores.double() / self._temperature - uniform.log().neg().log().to(scores.device)
