"""Rewrites of GraphModules. Always import this package as ``fxcompress.passes``."""

if __name__ != "fxcompress.passes":
    raise ImportError(f"import this package as fxcompress.passes, not as {__name__!r}: a second copy would split its state")
