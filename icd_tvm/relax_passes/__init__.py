"""Relax passes, one a file; the file is named after its pass."""
