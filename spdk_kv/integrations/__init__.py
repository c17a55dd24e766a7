"""Plug-ins for programs that run models, a folder each.

Each imports its host when it is imported itself, so that nobody needs a host to use the others.
"""
