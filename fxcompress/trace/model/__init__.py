"""Copies of a model that can be traced: without tensors of their own, without torch.compile, attention opened."""
