"""The offline room: the only one that writes an index."""

from gradtrace_indexer.build import build_index
from gradtrace_indexer.searcher_build import set_searcher
from gradtrace_indexer.verify import verify

__all__ = ["build_index", "set_searcher", "verify"]
