"""Engines over the kernel's page cache: of a file, of what a direct engine holds, of copies."""
