"""What is fitted once to a model and its training data: the eigenbasis, EK-FAC's eigenvalues, Adam's preconditioner,
TRAK's kernels, the representer head. The indexer stores them; methods use them."""
