"""Triton kernels and their launchers, installed as `evaat_fast.kernels`. A launcher checks nothing and allocates nothing."""

if __name__ != "evaat_fast.kernels":
    # The source folder would shadow the PyPI package `kernels` that transformers and diffusers look for.
    raise ImportError(f"this folder installs as evaat_fast.kernels, not as {__name__!r}", name=__name__)
