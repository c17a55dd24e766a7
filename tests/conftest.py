"""What holds for every test."""

from hypothesis import settings

# An example may stall on a busy machine; what hangs, the timeout of the test ends.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
