"""The DBpedia example with 400 rows, for programs that load it by its name."""

from shortened_examples import shortened

TASK = shortened("dbpedia", 400)
