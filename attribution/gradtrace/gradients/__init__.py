"""Per-example gradients of any model: the path that each parameter takes, and the capture of its layer's factors.

The examination compares every path with autograd. Layers' formulas are in `layers`, compression in `basis`."""
