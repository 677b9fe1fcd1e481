"""Influence by exact Hessian-vector products and conjugate gradients, without an index: for small models and checks."""
