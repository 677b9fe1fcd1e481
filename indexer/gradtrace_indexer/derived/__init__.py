"""What is computed from a finished index: TRAK's kernels and the representer head."""
