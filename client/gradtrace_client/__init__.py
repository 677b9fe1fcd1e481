"""Typed client of the Gradtrace service: which training examples made this model predict that?"""

from gradtrace_client._async_client import AsyncClient
from gradtrace_client._errors import (
    AuthenticationError,
    BusyError,
    ClientError,
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
    SelfInfluenceOptions,
)
from gradtrace_client._sync_client import Client
from gradtrace_client.browse_schemas import ExamplesAnswer
from gradtrace_client.group_and_pair_schemas import GroupsAnswer, PairsAnswer
from gradtrace_client.request_schemas import RowFilter
from gradtrace_client.schemas import (
    ExampleAnswer,
    Hit,
    IndexDetails,
    Influence,
    InfluenceAnswer,
    SelfInfluenceAnswer,
)
from gradtrace_client.service_schemas import Indexes, Job, Jobs

__all__ = [
    "AsyncClient",
    "AuthenticationError",
    "BusyError",
    "Client",
    "ClientError",
    "DeadlineError",
    "ExampleAnswer",
    "ExamplesAnswer",
    "ExamplesOptions",
    "ForbiddenError",
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
    "NotFoundError",
    "NotTakenOverError",
    "PairsAnswer",
    "PairsOptions",
    "ProblemError",
    "ProtocolError",
    "QuestionOptions",
    "RowFilter",
    "SelfInfluenceAnswer",
    "SelfInfluenceOptions",
    "ServiceError",
    "UnreachableError",
]
