"""Search over row shards: the rows of an open index divided among processes, or among machines.

Each shard opens the same generation for consecutive rows of its own. A question goes to all of them, and what they
answer is merged into the answer that one searcher gives."""
