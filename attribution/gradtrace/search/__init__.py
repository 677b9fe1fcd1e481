"""Searchers: the training rows with the highest and the lowest inner products with a query vector.

They know vectors and rows, not methods or models. The index writes their files (`gradtrace_indexer.searchers`)."""
