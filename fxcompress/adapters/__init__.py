"""Self-compression in the training loops of other libraries: one module each, imported by name."""
