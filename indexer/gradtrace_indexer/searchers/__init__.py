"""Building, measuring and setting the searcher of an index."""
