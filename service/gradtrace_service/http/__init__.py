"""The HTTP edge: routes, problem documents, keys, limits, headers, metrics and the access log."""
