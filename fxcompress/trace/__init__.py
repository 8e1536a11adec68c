"""From a model and its example inputs to a graph that keeps all of the model."""
