"""Plug-ins for programs that run models. Each module imports its host when it is imported itself,
and nothing else in the package imports any of them; what several need is in ``layer_stream``."""
