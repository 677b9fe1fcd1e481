"""Writing the files of an index durably, under the lock of its sole writer.

What is written is decided in the rooms above."""
