"""What lab.py is made of: a whole PC in QEMU, with NVMe drives and an IOMMU, and a way into it.

Standard library only. ``needs`` says what the host lacks, ``hardware`` is QEMU's command line,
``initramfs`` the first file system, ``machine`` boots and stops, ``guestlink`` runs commands
inside, ``qmp`` speaks to QEMU itself.
"""
