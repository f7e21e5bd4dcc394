"""Re-decide the memory layout of a compressed model after every compression step.

The public API lives here and nowhere else; everything below is importable by its own path.
"""

__version__ = "0.1.0"
