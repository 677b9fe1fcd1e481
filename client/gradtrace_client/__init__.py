"""Typed client of the Gradtrace service: which training examples made this model predict that?"""

from gradtrace_client._async_client import AsyncClient
from gradtrace_client._errors import (
    AuthenticationError,
    BusyError,
    ClientError,
    ConflictError,
    DeadlineError,
    ForbiddenError,
    InvalidRequestError,
    JobFailedError,
    NotFoundError,
    NotTakenOverError,
    ProblemError,
    ProtocolError,
    ServiceError,
    UnreachableError,
)
from gradtrace_client._options import (
    ExamplesOptions,
    GroupsOptions,
    InfluenceOptions,
    PairsOptions,
    QuestionOptions,
    RemovalOptions,
    SelfInfluenceOptions,
    TokensOptions,
)
from gradtrace_client._sync_client import Client
from gradtrace_client.browse_schemas import ColumnsAnswer, ExamplesAnswer, Overview
from gradtrace_client.comparison_schemas import ComparisonAnswer
from gradtrace_client.completion_schemas import CompletionAnswer
from gradtrace_client.group_and_pair_schemas import GroupsAnswer, PairsAnswer
from gradtrace_client.removal_schemas import RemovalAnswer
from gradtrace_client.request_schemas import RowFilter, ScoresQuestion
from gradtrace_client.schemas import (
    ExampleAnswer,
    Hit,
    IndexDetails,
    Influence,
    InfluenceAnswer,
    SelfInfluenceAnswer,
)
from gradtrace_client.service_schemas import Generations, Indexes, Job, Jobs, Retraining
from gradtrace_client.state_schemas import (
    Mark,
    MarkChange,
    MarksAnswer,
    SavedQuestion,
    SavedQuestions,
    ServiceEvent,
    WhoAmI,
)
from gradtrace_client.token_schemas import RowTokens, TokensAnswer

__all__ = [
    "AsyncClient",
    "AuthenticationError",
    "BusyError",
    "Client",
    "ClientError",
    "ColumnsAnswer",
    "ComparisonAnswer",
    "CompletionAnswer",
    "ConflictError",
    "DeadlineError",
    "ExampleAnswer",
    "ExamplesAnswer",
    "ExamplesOptions",
    "ForbiddenError",
    "Generations",
    "GroupsAnswer",
    "GroupsOptions",
    "Hit",
    "IndexDetails",
    "Indexes",
    "Influence",
    "InfluenceAnswer",
    "InfluenceOptions",
    "InvalidRequestError",
    "Job",
    "JobFailedError",
    "Jobs",
    "Mark",
    "MarkChange",
    "MarksAnswer",
    "NotFoundError",
    "NotTakenOverError",
    "Overview",
    "PairsAnswer",
    "PairsOptions",
    "ProblemError",
    "ProtocolError",
    "QuestionOptions",
    "RemovalAnswer",
    "RemovalOptions",
    "Retraining",
    "RowFilter",
    "RowTokens",
    "SavedQuestion",
    "SavedQuestions",
    "ScoresQuestion",
    "SelfInfluenceAnswer",
    "SelfInfluenceOptions",
    "ServiceError",
    "ServiceEvent",
    "TokensAnswer",
    "TokensOptions",
    "UnreachableError",
    "WhoAmI",
]
