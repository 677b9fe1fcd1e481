"""What an answer holds: hits, groups, shares by layer, percentiles, notes; how rescoring changes it; how it is shown.

No search is done here."""
