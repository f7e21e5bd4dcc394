"""Subcommands of ``icd`` that need more than a few lines."""
