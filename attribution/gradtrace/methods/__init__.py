"""The methods of attribution, by name."""

from __future__ import annotations

from gradtrace.errors import QueryError
from gradtrace.methods.bm25 import BM25
from gradtrace.methods.hydra import Hydra
from gradtrace.methods.influence import Influence
from gradtrace.methods.method import Method, MethodOptions, Scoring, Similarity, Weights
from gradtrace.methods.representer import Representer
from gradtrace.methods.repsim import RepSim
from gradtrace.methods.source import FastSource, Source
from gradtrace.methods.tracin import Cosine, GradDot, TracIn, TracInAdam
from gradtrace.methods.trak import Trak
from gradtrace.store.manifest import Manifest

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        TracIn(),
        TracInAdam(),
        GradDot(),
        Cosine(),
        Influence(),
        Source(),
        FastSource(),
        Trak(),
        Hydra(),
        RepSim(),
        Representer(),
        BM25(),
    )
}


def available_methods(manifest: Manifest) -> list[str]:
    """Names of the methods that an index answers by."""
    return [name for name, method in METHODS.items() if method.lacks(manifest) is None]


def method_named(name: str, manifest: Manifest) -> Method:
    """Raises QueryError for an unknown method, or one whose prerequisites this index lacks."""
    if name not in METHODS:
        raise QueryError(f"unknown method {name!r}; this index offers {', '.join(available_methods(manifest))}")
    lacking = METHODS[name].lacks(manifest)
    if lacking is not None:
        raise QueryError(f"this index does not answer by {name!r}: {lacking}")
    return METHODS[name]


__all__ = [
    "METHODS",
    "Method",
    "MethodOptions",
    "Scoring",
    "Similarity",
    "Weights",
    "available_methods",
    "method_named",
]
