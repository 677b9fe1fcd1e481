"""The labels that a model would give: the outputs and the law of the labels, read from the loss while it runs.

The Fisher information (`fitted.fisher_batches`) draws from these laws; predictions come from the same outputs."""
