"""From a model and its example inputs to a graph that keeps all of the model.

    tracer.trace(model, inputs)     which way: symbolic/, or else concrete/ with paths/
        both_modes                  on a copy that model/ makes
        -> traced.TracedModule      its graphs, in evaluation and in training, and all else that the model holds

``support`` says who is refused at the door; ``verify`` compares a graph with its model where nobody can see what code
asks; ``weights`` makes parameters of weights that the model computes. What is in the folders, and which may know which,
is in docs/architecture.md.
"""
