"""Calls that find what to ask about. `make client` generates `_sync_browse_client.py` from this file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import Unpack

from gradtrace_client._options import ExamplesOptions
from gradtrace_client._requests import index_param, request_json
from gradtrace_client._responses import Answer, Verb
from gradtrace_client.browse_requests import MAX_POINTS, ColumnsRequest, ExamplesRequest
from gradtrace_client.browse_schemas import ColumnsAnswer, ExamplesAnswer, Overview
from gradtrace_client.completion_schemas import CompletionAnswer, CompletionRequest
from gradtrace_client.schemas import ExampleAnswer, Split


class AsyncBrowseClient(ABC):
    """Rows, columns, the overview and completions. The subclass sends requests."""

    @abstractmethod
    async def _send(
        self, verb: Verb, path: str, schema: type[Answer], *, repeatable: bool = True, **content: Any
    ) -> Answer: ...

    async def examples(self, split: Split, row: int, *, index: str | None = None) -> ExampleAnswer:
        """One row of the training or query data set, rendered; NotFoundError if there is no such row."""
        return await self._send("GET", f"/examples/{split}/{row}", ExampleAnswer, params=index_param(index))

    async def list_examples(
        self, split: Split, *, k: int = 50, offset: int = 0, **options: Unpack[ExamplesOptions]
    ) -> ExamplesAnswer:
        """One page of the rows of the training or query data set that meet all conditions.

        Args:
            k: Rows in the answer, at most 1,000.
            offset: Rows skipped before the first.
            options: See `ExamplesOptions`: labels, correct, min_loss, text, order, render ...
        """
        params = request_json(ExamplesRequest, k=k, offset=offset, **options)
        return await self._send("GET", f"/examples/{split}", ExamplesAnswer, params=params)

    async def columns(
        self, split: Split, names: Sequence[str], *, k: int = MAX_POINTS, index: str | None = None
    ) -> ColumnsAnswer:
        """Values of all rows of a data set or, where these are more than k, of k evenly spaced ones.

        Args:
            names: `label`, `prediction`, `loss`, `correct`, of training rows also `norm` and `self_influence`, and
                `feature:NAME` of a table.
        """
        params = request_json(ColumnsRequest, names=names, k=k, index=index)
        return await self._send("GET", f"/columns/{split}", ColumnsAnswer, params=params)

    async def overview(self, index: str | None = None) -> Overview:
        """An index at a glance: rows and losses by class, by checkpoint, and their distribution."""
        return await self._send("GET", "/overview", Overview, params=index_param(index))

    async def complete(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        index: str | None = None,
        max_tokens: int = 32,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> CompletionAnswer:
        """What a language model writes after a prompt. `influence` takes the answer's `payload` and says why.

        Args:
            prompt: A text, or the messages of a conversation, `{"role": ..., "content": ...}`.
            index: Name of the index, one of `client.indexes()`. Default: the first.
            max_tokens: Tokens that are written at most, up to 256.
            temperature: 0 takes the most probable token each time; above, tokens are drawn.
            seed: Of the draws.
        """
        given = {"prompt": prompt} if isinstance(prompt, str) else {"messages": list(prompt)}
        options = {"index": index, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        body = request_json(CompletionRequest, **given, **options)
        return await self._send("POST", "/complete", CompletionAnswer, json=body)
