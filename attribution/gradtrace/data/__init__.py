"""Training examples: reading, sampling and collating them, and checks of the data set and the loss.

No gradients are computed here."""
