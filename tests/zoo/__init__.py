"""The cases of `model_zoo`, a module for each kind."""
