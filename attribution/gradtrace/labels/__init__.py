"""The labels that a model would give: the outputs and the law of the labels, found in the loss while it runs.

What is found is used by the Fisher information (`fitted.fisher_batches`) and for predictions."""
