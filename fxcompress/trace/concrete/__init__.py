"""Tracing by running on example inputs: fake tensors, sizes that are seen, and the graph that is written meanwhile."""
