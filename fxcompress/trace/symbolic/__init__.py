"""Tracing with symbols, by torch.fx: what stands for a value, and what that must be able to answer."""
