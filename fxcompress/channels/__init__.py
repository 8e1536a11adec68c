"""Which channels of a network hang together, which are constant, and what may go: analysis only, no rewriting."""
