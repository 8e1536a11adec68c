"""From a model to a graph that keeps all of it."""
