"""A checkpoint's model, ready to be asked: its gradients in a basis, losses, predictions and representations.

Nothing here searches or knows of methods."""
