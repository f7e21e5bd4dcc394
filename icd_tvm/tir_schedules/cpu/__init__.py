"""CPU kernels and schedule rules: a rule returns a schedule, or None."""
