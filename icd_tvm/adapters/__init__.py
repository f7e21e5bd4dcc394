"""Transforms on arrays (S, Q, K): arrays in, arrays and metadata out. Knows no TVM."""
