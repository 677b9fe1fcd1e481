"""The wire schemas of texts that a model writes, request and answer."""

from __future__ import annotations

from html import escape
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from gradtrace_client.request_schemas import RequestSchema, whole
from gradtrace_client.schemas import AnswerSchema, IndexInfo, Payload, Timing

MAX_TOKENS = 256  # of a completion: some seconds of a small model
MAX_PROMPT = 100_000  # characters
MAX_MESSAGES = 1_000


class Message(RequestSchema):
    """A turn of a conversation."""

    role: str = Field(max_length=64, description="As the model's chat template knows them: `user`, `assistant` ...")
    content: str = Field(max_length=MAX_PROMPT)


class CompletionRequest(RequestSchema):
    """A model is to write what comes after a prompt. Exactly one of `prompt` and `messages` is given."""

    index: str | None = Field(None, max_length=64, description="Which of the service's indexes. Default: the first.")
    prompt: str | None = Field(None, max_length=MAX_PROMPT, description="The text that goes on.")
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = Field(
        None, description="The conversation whose next turn is written, for models with a chat template."
    )
    max_tokens: Annotated[int, Field(strict=True, ge=1, le=MAX_TOKENS), BeforeValidator(whole)] = Field(
        32, description="Tokens that are written at most."
    )
    temperature: Annotated[float, Field(strict=True, ge=0, le=100, allow_inf_nan=False)] = Field(
        0.0, description="0: the most probable token each time. Above: tokens are drawn, at 1 by their probabilities."
    )
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63), BeforeValidator(whole)] = Field(
        0, description="Of the draws: the same seed gives the same text."
    )


class CompletionAnswer(AnswerSchema):
    """What the model of the last checkpoint wrote."""

    index: IndexInfo
    text: str = Field(description="The completion, without special tokens.")
    tokens: list[str] = Field(
        description="The texts of its tokens, with the one that ends it; `only` in a question counts these from 0."
    )
    payload: Payload = Field(description="The `example` that asks why the model wrote this.")
    ended: Literal["end", "length", "time"] = Field(
        description="`end`: the model ended it. `length`, `time`: it might have gone on."
    )
    timing_ms: Timing

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.text)}</p>"
