"""The compiled extensions; built from ``cython_src/``."""
