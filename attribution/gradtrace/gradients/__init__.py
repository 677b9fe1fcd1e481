"""Per-example gradients of any model: which path each parameter takes, and the capture of its factors.

The examination compares every path with autograd. Layers' formulas are in `layers`; compression is in `basis`."""
