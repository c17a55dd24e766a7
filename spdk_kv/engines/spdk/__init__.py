"""SPDK: NVMe drives from user space, polled, past the kernel."""
