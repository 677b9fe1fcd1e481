"""Building an index: the fit, the rows of every checkpoint, and the checks before it is published."""
