"""A model that has no graph as a whole: the modules in it that have one, and how these are put back."""
