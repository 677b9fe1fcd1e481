"""Changing a finished index: rows appended or deleted, checkpoints added, shards compacted, directories watched."""
