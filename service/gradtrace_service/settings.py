"""Settings of the service: flags of `gradtrace serve`, GRADTRACE_* environment variables, or keys of a TOML file.

Flags override the environment, which overrides the file. docs/settings.md is generated from this.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from gradtrace.errors import GradtraceError

_PREFIX = "GRADTRACE_"


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


_Paths = Annotated[list[Path] | None, NoDecode, BeforeValidator(_split)]
_Texts = Annotated[list[str] | None, NoDecode, BeforeValidator(_split)]


class SettingsError(GradtraceError):
    """A setting has an invalid value."""


class Settings(BaseSettings):
    """Each field is a flag (--batch-size), a variable (GRADTRACE_BATCH_SIZE) and a key of the file (batch_size)."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    fd: int | None = Field(
        None,
        ge=0,
        description="Descriptor of a listening socket that the service inherits, in place of host and port: 3, if "
        "systemd activates it.",
    )
    device: str = Field("auto", description='Where gradients are computed: "auto", "cpu", "cuda", "cuda:1" ...')
    checkpoints: _Paths = Field(
        None, description="Directory of the weights, one for each training run, if they were moved since the build."
    )
    processes: int = Field(
        1,
        ge=0,
        le=64,
        description="Number of processes that answer. One that hangs or ends is replaced; 0: a thread of the service "
        "answers, which cannot be replaced. Several are for CPUs. They share the "
        "stored rows, but each holds models, and 4 bytes x rows x checkpoints x (columns of the first level + levels) "
        "for the search: 0.7 GB for a million rows at 5 checkpoints.",
    )
    shards: int = Field(
        0,
        ge=0,
        le=1024,
        description="Number of further processes among which each worker divides the rows of each index, which then "
        "search at the same time; 0: each worker searches all rows itself. What --processes says of the memory for the "
        "search is then held once over all shards, for each worker.",
    )
    ray: str | None = Field(
        None,
        description="Address of a Ray cluster, as ray.init takes it, whose actors the shards are in place of processes "
        'of this machine; "local": of a cluster that is started here. Needs the extra gradtrace[ray], there and here, '
        "and the index at the same path on every machine.",
    )
    batch_size: PositiveInt = Field(
        16,
        description="Queries that are answered in one pass, if as many wait. A request with more takes several passes, "
        "between which others have their turn.",
    )
    batch_wait_ms: float = Field(0.0, ge=0, le=1000, description="Time that a free worker waits for more queries.")
    queue_size: PositiveInt = Field(256, description="Requests that may wait; those beyond are answered with 429.")
    max_in_flight: PositiveInt | None = Field(
        None,
        description="Requests of one key, or of one address where there are no keys, that may wait or be computed at a "
        "time; those beyond are answered with 429.",
    )
    deadline_seconds: PositiveFloat = Field(60.0, description="Time from a request to its answer; beyond it, 504.")
    grace_seconds: NonNegativeFloat = Field(
        5.0, description="Time after SIGTERM in which requests are still accepted, while /readyz is 503."
    )
    drain_seconds: PositiveInt = Field(30, description="Time that accepted requests have to finish after that.")
    memory_limit_mb: PositiveInt | None = Field(
        None, description="Memory of a process beyond which the least recently used index is unloaded."
    )
    worker_memory_limit_mb: PositiveInt | None = Field(
        None, description="Memory of a worker process beyond which it is replaced, between two answers."
    )
    api_key_file: Path | None = Field(
        None, description="File of the keys that may ask, made by `gradtrace key new`; without it, anybody may."
    )
    insecure: bool = Field(False, description="Listen without keys on an address that other machines reach.")
    rate_limit: PositiveInt | None = Field(
        None, description="Requests a minute of one key, or of one address where there are no keys; beyond, 429."
    )
    cors_origins: _Texts = Field(
        None,
        description="Origin, such as https://example.org, whose pages may ask; by default none but the service's own.",
    )
    state: Path | None = Field(
        None,
        description="SQLite file of what is kept in the service: marks of training rows, saved questions and jobs. "
        "Made when it is first written to. Default: INDEX.state.sqlite, beside the directory of the first index.",
    )
    audit_log: Path | None = Field(None, description="File to which each admin call is written, as a line of JSON.")
    job_workers: PositiveInt = Field(
        1, description="Processes that share the work of a job that brings an index up to date."
    )
    max_body_mb: PositiveFloat = Field(16.0, description="Size of a request's body; larger ones are refused with 413.")
    max_connections: PositiveInt | None = Field(
        None,
        description="Connections that are open at a time; at the limit, a new one takes the place of the idlest, or is "
        "answered with 503. Default: 1,024, or half of the file descriptors that may be opened, if that is less.",
    )
    log_format: Literal["text", "json"] = Field("text", description="Format of the log, which goes to standard error.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The lowest level that is logged."
    )
    otel_endpoint: str | None = Field(
        None,
        description="OpenTelemetry collector that receives traces, by OTLP over HTTP, such as http://127.0.0.1:4318; "
        "OTEL_EXPORTER_OTLP_ENDPOINT works as well. Needs the extra gradtrace[otel].",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


DEFAULTS = Settings.model_construct()  # reads neither the environment nor a file


def read_settings(config: Path | None, **flags: Any) -> Settings:
    """Settings from the flags that were given (not None), the environment, and the file.

    Raises:
        SettingsError: a value is invalid, or the file cannot be read or has a key that is not a setting.
    """
    given = {name: value for name, value in flags.items() if value is not None}

    class Configured(Settings):
        model_config = SettingsConfigDict(toml_file=config)

    try:
        return Configured(**given)
    except ValidationError as error:
        problems = "; ".join(_problem(detail, given, config) for detail in error.errors())
        raise SettingsError(f"{problems}. docs/settings.md lists the settings and what they may be") from None
    except ValueError as error:
        raise SettingsError(f"{config} is not TOML: {error}; docs/settings.md shows what it may hold") from None


def _problem(error: ErrorDetails, flags: Mapping[str, Any], config: Path | None) -> str:
    """Where a value was given, the value, and why it is invalid."""
    name = str(error["loc"][0]) if error["loc"] else ""
    if name not in Settings.model_fields:
        near = difflib.get_close_matches(name, Settings.model_fields, n=1)
        return f"{config}: {name} is not a setting; " + (f"did you mean {near[0]}?" if near else "leave it out")
    variable = f"{_PREFIX}{name.upper()}"
    if name in flags:
        place = f"--{name.replace('_', '-')}"
    elif variable in os.environ:
        place = variable
    else:
        place = f"{name} in {config}"
    return f"{place} is {error['input']!r}: {error['msg'][:1].lower()}{error['msg'][1:]}"
