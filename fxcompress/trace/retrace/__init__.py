"""What tracing a model again can tell: which sizes are attributes of it, and where other sizes part from its path."""
