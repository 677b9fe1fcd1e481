"""The engine: requests wait in a queue, go to workers in batches, and are given up at their deadline.

What a work computes is its handler's business (`answers`)."""
