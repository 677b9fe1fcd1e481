"""The basis: the coordinates of gradients that an index keeps, and how rows are brought into them.

How a basis is fitted to a model is in `fitted`."""
