"""What this machine has: NVMe drives and the host around them.

Standard library only, and read-only: nothing here changes a device or a setting. Every reader
takes ``root``, the directory that stands for ``/``, and answers None or an empty tuple for what
the kernel does not tell.
"""
