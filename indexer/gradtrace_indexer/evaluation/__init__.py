"""Ground truth by retraining, how well methods predict it (LDS), and the choice of checkpoints."""
