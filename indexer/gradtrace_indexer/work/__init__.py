"""Sharing the work on an unfinished generation among processes: its steps, who does which, and starting the workers.

Everything that workers tell each other lies in the index directory, under `unfinished/`."""
