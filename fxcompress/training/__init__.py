"""Training: what is dead, what size costs, and how the optimizer follows when channels go."""
