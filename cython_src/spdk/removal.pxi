# Removal of a PCIe drive: it is pulled out, or the kernel requests it back and waits until this
# process releases it. Included in spdk.pyx: SPDK's state must exist once.

# At the kernel's request commands in flight have this long to complete; the drive still answers.
DEF DRAIN_NS = 1_000_000_000
# The command register, and its bit that enables DMA (PCI Local Bus 3.0, 6.2.2).
DEF PCI_COMMAND = 4
DEF PCI_BUS_MASTER = 4
DEF PCI_CLASS_REVISION = 8


cdef enum:
    ALL_ONES = 0xFFFFFFFFU


cdef void _cut_off(Admin *a) noexcept nogil:
    """Disables the drive's DMA."""
    cdef uint16_t command = 0xFFFF
    if spdk_pci_device_cfg_read16(a.pci, &command, PCI_COMMAND) == 0 and command != 0xFFFF:
        spdk_pci_device_cfg_write16(a.pci, command & ~<uint16_t>PCI_BUS_MASTER, PCI_COMMAND)


cdef void _check_removal(Admin *a) noexcept nogil:
    """Sets ``gone`` if the drive was removed or requested back, and ``out`` once its DMA is off."""
    cdef spdk_nvme_transport_id transport
    cdef uint64_t now
    cdef spdk_nvme_csts_register status = spdk_nvme_ctrlr_get_regs_csts(a.ctrlr)
    cdef uint32_t revision = 0
    cdef bint dead
    # A removed drive reads as all ones. Some virtual machines do not do so for its registers, and
    # in its configuration space vfio-pci emulates the vendor ID.
    spdk_pci_device_cfg_read32(a.pci, &revision, PCI_CLASS_REVISION)
    dead = status.raw == ALL_ONES or revision == ALL_ONES
    if not dead and not spdk_pci_device_is_removed(a.pci):
        return
    now = skv_now_ns()
    if not a.gone_at_ns:
        a.gone_at_ns = now
        a.gone = True
    if not dead and now - a.gone_at_ns < DRAIN_NS:
        return
    _cut_off(a)
    # After this SPDK sends it nothing, not even a shutdown when it is closed.
    memset(&transport, 0, sizeof(transport))
    spdk_nvme_trid_populate_transport(&transport, SPDK_NVME_TRANSPORT_PCIE)
    spdk_nvme_scan_attached(&transport)
    if not spdk_nvme_ctrlr_is_failed(a.ctrlr):
        spdk_nvme_ctrlr_fail(a.ctrlr)
    a.out = True
