# A PCIe drive that goes away: pulled out of its slot, or claimed back by the kernel, which then waits
# for as long as this process holds it.

# When the kernel asks, what is in flight has this long to complete; the drive still answers then.
DEF DRAIN_NS = 1_000_000_000
# The command register, and its bit that lets a device reach memory (PCI Local Bus 3.0, 6.2.2).
DEF PCI_COMMAND = 4
DEF PCI_BUS_MASTER = 4
DEF PCI_CLASS_REVISION = 8


cdef enum:
    ALL_ONES = 0xFFFFFFFFU


cdef void _cut_off(Admin *a) noexcept nogil:
    """The device reaches no memory any more."""
    cdef uint16_t command = 0xFFFF
    if spdk_pci_device_cfg_read16(a.pci, &command, PCI_COMMAND) == 0 and command != 0xFFFF:
        spdk_pci_device_cfg_write16(a.pci, command & ~<uint16_t>PCI_BUS_MASTER, PCI_COMMAND)


cdef void _look_for_removal(Admin *a) noexcept nogil:
    """Sets ``gone`` when the drive is out or wanted back, and ``out`` when it can do no harm."""
    cdef spdk_nvme_transport_id transport
    cdef uint64_t now
    cdef spdk_nvme_csts_register status = spdk_nvme_ctrlr_get_regs_csts(a.ctrlr)
    cdef uint32_t revision = 0
    cdef bint dead
    # What is not there reads as all ones. Not all virtual machines do so for a drive's registers;
    # and of its configuration, vfio-pci answers the vendor's number itself.
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
    # SPDK then sends it nothing more either, not even a shutdown when it is closed.
    memset(&transport, 0, sizeof(transport))
    spdk_nvme_trid_populate_transport(&transport, SPDK_NVME_TRANSPORT_PCIE)
    spdk_nvme_scan_attached(&transport)
    if not spdk_nvme_ctrlr_is_failed(a.ctrlr):
        spdk_nvme_ctrlr_fail(a.ctrlr)
    a.out = True
