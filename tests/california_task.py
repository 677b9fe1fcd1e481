"""The California example with 400 rows, for programs that load it by its name."""

from shortened_examples import shortened

TASK = shortened("california", 400)
