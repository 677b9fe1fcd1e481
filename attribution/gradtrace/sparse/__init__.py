"""Rows that keep the strongest coordinates of their own: the inverted index of such rows, and its search.

A dense row has the coordinates of a basis, the same for all rows; a sparse one names its coordinates. Nothing here
writes an index."""
