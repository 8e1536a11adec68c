"""What stands in a graph (calls, checks, regions, values), what its nodes are called, and calls put in one form."""
