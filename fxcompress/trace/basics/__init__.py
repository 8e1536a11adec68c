"""What the tracer stands on and what knows nothing of tracing: nested values, modules, ops, patches, precisions."""
