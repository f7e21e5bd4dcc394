"""What happens on the way from each state to the next; ``compile`` and ``run`` share it."""
