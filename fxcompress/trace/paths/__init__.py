"""One graph for several runs: of other batches, with gradients and without, in several precisions."""
