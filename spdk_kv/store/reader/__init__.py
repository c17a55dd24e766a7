"""A store that is open to be read only: beside its writer, or where nothing can be written."""
