"""The files of an index as they are read: manifest, shards of gradient rows, row ids, precision, filters by row.

Nothing here writes an index, knows of models, or scores."""
