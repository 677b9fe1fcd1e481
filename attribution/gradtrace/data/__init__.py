"""Training examples: reading, sampling and collating them, and checks of data set and loss.

No gradients are computed here."""
