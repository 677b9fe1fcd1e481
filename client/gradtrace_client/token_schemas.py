"""The wire schemas of answers about tokens: which of a training text, and which of the query's, scores come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from gradtrace_client._display import frame, note_html, strengths, tokens_html
from gradtrace_client.group_and_pair_schemas import Asked
from gradtrace_client.schemas import AnswerSchema, ScoresAnswer, Timing

if TYPE_CHECKING:
    import pandas


class TokenShares(AnswerSchema):
    """The sum of `scores` and `elsewhere` is the row's score."""

    scores: list[float] = Field(description="Of each token. Positive: it makes the row a proponent.")
    elsewhere: float = Field(
        description="What has no token: of layers that do not run over the tokens, of parameters without layers, and "
        "of the rounding of the stored row."
    )

    def strengths(self) -> list[float]:
        """Each token's score divided by the largest size of any: from -1 to 1; all 0 where all are."""
        return strengths(self.scores)


class RowTokens(AnswerSchema):
    """A row's score, by the tokens of its own text and, once more, by those of the query's."""

    row: int
    score: float = Field(description="By the stored row, without rescoring.")
    tokens: list[str] = Field(description="The texts of the row's tokens; joined, they read as its text.")
    training: TokenShares = Field(description="By `tokens`.")
    query: TokenShares = Field(description="By the answer's `query_tokens`.")


class TokensAnswer(ScoresAnswer):
    """`results` are in the order of the rows."""

    query: Asked
    query_tokens: list[str] = Field(description="The texts of the query's tokens.")
    results: list[RowTokens]
    timing_ms: Timing

    def sides(self, result: RowTokens) -> Iterator[tuple[str, Sequence[str], TokenShares]]:
        """Of a result: the name of each side, its tokens, and their scores."""
        yield "training", result.tokens, result.training
        yield "query", self.query_tokens, result.query

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each token of each row, on both sides."""
        return frame(
            [
                {"row": result.row, "side": side, "position": position, "token": token, "score": score}
                for result in self.results
                for side, tokens, shares in self.sides(result)
                for position, (token, score) in enumerate(zip(tokens, shares.scores, strict=True))
            ]
        )

    def _repr_html_(self) -> str:
        blocks = (
            f"<p>row {result.row}, score {result.score:+.4g}, {side}: {tokens_html(tokens, shares.scores)}</p>"
            for result in self.results
            for side, tokens, shares in self.sides(result)
        )
        return "".join(blocks) + note_html(self.convention)
