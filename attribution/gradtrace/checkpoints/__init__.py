"""Checkpoints: weights, learning rates and optimizer states as trainings write them, and the recorder that does.

Readers of other libraries' directories are in `readers`. No model is run here."""
