"""Compressed models as users bring them: trained, pruned and fine-tuned here, on a CPU."""
