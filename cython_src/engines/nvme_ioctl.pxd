# NVMe passthrough as the kernel offers it (linux/nvme_ioctl.h); declarations only.
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "<linux/nvme_ioctl.h>" nogil:
    struct nvme_uring_cmd:
        uint8_t opcode
        uint32_t nsid
        uint64_t addr
        uint32_t data_len
        uint32_t cdw10
        uint32_t cdw11
        uint32_t cdw12
    struct nvme_passthru_cmd:
        uint8_t opcode
        uint32_t nsid
        uint64_t addr
        uint32_t data_len
        uint32_t cdw10

    unsigned long NVME_IOCTL_ID
    unsigned long NVME_IOCTL_ADMIN_CMD
    uint32_t NVME_URING_CMD_IO
