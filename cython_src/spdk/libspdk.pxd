# The part of SPDK that the bindings use; declarations only.
from libc.stdint cimport int8_t, int32_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<spdk/version.h>" nogil:
    const char *SPDK_VERSION_STRING

cdef extern from "<spdk/env.h>" nogil:
    struct spdk_env_opts:
        const char *name
        const char *core_mask
        int shm_id
        int mem_size
        bint no_pci
        bint hugepage_single_segments
        bint unlink_hugepage
        bint no_huge
        const char *hugedir
        const char *iova_mode
        void *env_context
        size_t opts_size

    struct spdk_pci_device:
        pass

    uint32_t SPDK_MALLOC_DMA
    uint32_t SPDK_MALLOC_SHARE
    int SPDK_ENV_NUMA_ID_ANY

    void spdk_env_opts_init(spdk_env_opts *opts)
    int spdk_env_init(const spdk_env_opts *opts)
    void *spdk_zmalloc(size_t size, size_t align, uint64_t *unused, int numa_id, uint32_t flags)
    void spdk_free(void *buffer)
    int spdk_mem_register(void *address, size_t nbytes)
    int spdk_mem_unregister(void *address, size_t nbytes)
    bint spdk_pci_device_is_removed(spdk_pci_device *device)
    int spdk_pci_device_cfg_read16(spdk_pci_device *device, uint16_t *value, uint32_t offset)
    int spdk_pci_device_cfg_read32(spdk_pci_device *device, uint32_t *value, uint32_t offset)
    int spdk_pci_device_cfg_write16(spdk_pci_device *device, uint16_t value, uint32_t offset)

cdef extern from "<spdk/log.h>" nogil:
    enum spdk_log_level:
        SPDK_LOG_DISABLED
        SPDK_LOG_ERROR
        SPDK_LOG_WARN
        SPDK_LOG_NOTICE
        SPDK_LOG_INFO
        SPDK_LOG_DEBUG
    void spdk_log_set_print_level(spdk_log_level level)

cdef extern from "<spdk/uuid.h>" nogil:
    struct spdk_uuid:
        pass

cdef extern from "<spdk/nvme.h>" nogil:
    struct spdk_nvme_ctrlr:
        pass
    struct spdk_nvme_ns:
        pass
    struct spdk_nvme_qpair:
        pass

    struct spdk_nvme_transport_id:
        char traddr[257]
        char subnqn[224]

    struct spdk_nvme_ctrlr_opts:
        uint32_t num_io_queues
        uint32_t keep_alive_timeout_ms
        uint32_t admin_timeout_ms
        uint32_t io_queue_requests
        uint64_t fabrics_connect_timeout_us
        size_t opts_size

    struct spdk_nvme_io_qpair_opts:
        uint32_t io_queue_size
        uint32_t io_queue_requests
        bint delay_cmd_submit
        bint async_mode

    struct spdk_nvme_status:
        uint16_t sc
        uint16_t sct
        uint16_t dnr
    struct spdk_nvme_cpl:
        uint32_t cdw0
        spdk_nvme_status status

    struct spdk_nvme_ctrlr_vwc:
        uint8_t present
    # Its members were renamed between releases; read as the 16 bits of the specification.
    struct spdk_nvme_ctrlr_oncs:
        pass
    struct spdk_nvme_ctrlr_data:
        uint16_t vid
        int8_t sn[20]
        int8_t mn[40]
        uint8_t fr[8]
        uint8_t mdts
        spdk_nvme_ctrlr_vwc vwc
        spdk_nvme_ctrlr_oncs oncs

    struct spdk_nvme_ns_data:
        uint64_t eui64

    struct spdk_nvme_health_information_page:
        uint16_t temperature
        uint8_t available_spare
        uint8_t available_spare_threshold
        uint8_t percentage_used
        uint64_t data_units_read[2]
        uint64_t data_units_written[2]
        uint64_t power_cycles[2]
        uint64_t power_on_hours[2]
        uint64_t unsafe_shutdowns[2]
        uint64_t media_errors[2]

    struct spdk_nvme_dsm_range:
        uint32_t length
        uint64_t starting_lba

    uint32_t SPDK_NVME_GLOBAL_NS_TAG
    uint8_t SPDK_NVME_LOG_HEALTH_INFORMATION
    uint8_t SPDK_NVME_LOG_CHANGED_NS_LIST
    uint32_t SPDK_NVME_DSM_ATTR_DEALLOCATE

    ctypedef void (*spdk_nvme_cmd_cb)(void *, const spdk_nvme_cpl *) noexcept nogil
    ctypedef void (*spdk_nvme_remove_cb)(void *, spdk_nvme_ctrlr *) noexcept nogil

    enum spdk_nvme_transport_type:
        SPDK_NVME_TRANSPORT_PCIE
    union spdk_nvme_csts_register:
        uint32_t raw
    void spdk_nvme_trid_populate_transport(spdk_nvme_transport_id *trid,
                                           spdk_nvme_transport_type type)
    int spdk_nvme_scan_attached(const spdk_nvme_transport_id *trid)
    spdk_pci_device *spdk_nvme_ctrlr_get_pci_device(spdk_nvme_ctrlr *)
    spdk_nvme_csts_register spdk_nvme_ctrlr_get_regs_csts(spdk_nvme_ctrlr *)
    void spdk_nvme_ctrlr_fail(spdk_nvme_ctrlr *)
    int spdk_nvme_transport_id_parse(spdk_nvme_transport_id *trid, const char *text)
    int spdk_nvme_transport_available_by_name(const char *name)
    void spdk_nvme_ctrlr_get_default_ctrlr_opts(spdk_nvme_ctrlr_opts *opts, size_t nbytes)
    struct spdk_nvme_probe_ctx:
        pass
    struct spdk_nvme_detach_ctx:
        pass
    ctypedef void (*spdk_nvme_attach_cb)(void *, const spdk_nvme_transport_id *, spdk_nvme_ctrlr *,
                                         const spdk_nvme_ctrlr_opts *) noexcept nogil
    spdk_nvme_probe_ctx *spdk_nvme_connect_async(const spdk_nvme_transport_id *trid,
                                                 const spdk_nvme_ctrlr_opts *opts,
                                                 spdk_nvme_attach_cb)
    int spdk_nvme_probe_poll_async(spdk_nvme_probe_ctx *)
    int spdk_nvme_detach_async(spdk_nvme_ctrlr *, spdk_nvme_detach_ctx **)
    int spdk_nvme_detach_poll_async(spdk_nvme_detach_ctx *)
    int spdk_nvme_ctrlr_disconnect(spdk_nvme_ctrlr *)
    void spdk_nvme_ctrlr_reconnect_async(spdk_nvme_ctrlr *)
    int spdk_nvme_ctrlr_reconnect_poll_async(spdk_nvme_ctrlr *)
    bint spdk_nvme_ctrlr_is_failed(spdk_nvme_ctrlr *)
    void spdk_nvme_ctrlr_set_remove_cb(spdk_nvme_ctrlr *, spdk_nvme_remove_cb, void *)
    int32_t spdk_nvme_ctrlr_process_admin_completions(spdk_nvme_ctrlr *)
    const spdk_nvme_ctrlr_data *spdk_nvme_ctrlr_get_data(spdk_nvme_ctrlr *)
    uint32_t spdk_nvme_ctrlr_get_max_xfer_size(const spdk_nvme_ctrlr *)
    uint32_t spdk_nvme_ctrlr_get_first_active_ns(spdk_nvme_ctrlr *)
    uint32_t spdk_nvme_ctrlr_get_next_active_ns(spdk_nvme_ctrlr *, uint32_t)
    spdk_nvme_ns *spdk_nvme_ctrlr_get_ns(spdk_nvme_ctrlr *, uint32_t)
    int spdk_nvme_ctrlr_cmd_get_log_page(spdk_nvme_ctrlr *, uint8_t page, uint32_t nsid,
                                         void *payload, uint32_t nbytes, uint64_t offset,
                                         spdk_nvme_cmd_cb, void *)
    uint8_t SPDK_NVME_FEAT_ARBITRATION
    int spdk_nvme_ctrlr_cmd_get_feature(spdk_nvme_ctrlr *, uint8_t feature, uint32_t cdw11,
                                        void *payload, uint32_t nbytes, spdk_nvme_cmd_cb, void *)
    int spdk_nvme_ctrlr_cmd_abort_ext(spdk_nvme_ctrlr *, spdk_nvme_qpair *, void *command_argument,
                                      spdk_nvme_cmd_cb, void *)

    void spdk_nvme_ctrlr_get_default_io_qpair_opts(spdk_nvme_ctrlr *, spdk_nvme_io_qpair_opts *,
                                                   size_t nbytes)
    spdk_nvme_qpair *spdk_nvme_ctrlr_alloc_io_qpair(spdk_nvme_ctrlr *,
                                                    const spdk_nvme_io_qpair_opts *, size_t nbytes)
    int spdk_nvme_ctrlr_free_io_qpair(spdk_nvme_qpair *)
    bint spdk_nvme_qpair_is_connected(spdk_nvme_qpair *)
    int32_t spdk_nvme_qpair_process_completions(spdk_nvme_qpair *, uint32_t most)
    int spdk_nvme_qpair_add_cmd_error_injection(spdk_nvme_ctrlr *, spdk_nvme_qpair *, uint8_t opcode,
                                                bint do_not_submit, uint64_t timeout_us,
                                                uint32_t count, uint8_t sct, uint8_t sc)
    void spdk_nvme_qpair_remove_cmd_error_injection(spdk_nvme_ctrlr *, spdk_nvme_qpair *,
                                                    uint8_t opcode)

    bint spdk_nvme_ns_is_active(spdk_nvme_ns *)
    uint32_t spdk_nvme_ns_get_sector_size(spdk_nvme_ns *)
    uint64_t spdk_nvme_ns_get_size(spdk_nvme_ns *)
    uint64_t spdk_nvme_ns_get_num_sectors(spdk_nvme_ns *)
    uint32_t spdk_nvme_ns_get_max_io_xfer_size(spdk_nvme_ns *)
    uint32_t spdk_nvme_ns_get_optimal_io_boundary(spdk_nvme_ns *)
    uint32_t spdk_nvme_ns_get_md_size(spdk_nvme_ns *)
    int spdk_nvme_ns_get_pi_type(spdk_nvme_ns *)
    const uint8_t *spdk_nvme_ns_get_nguid(const spdk_nvme_ns *)
    const spdk_uuid *spdk_nvme_ns_get_uuid(const spdk_nvme_ns *)
    const spdk_nvme_ns_data *spdk_nvme_ns_get_data(spdk_nvme_ns *)
    int spdk_nvme_ns_cmd_read(spdk_nvme_ns *, spdk_nvme_qpair *, void *payload, uint64_t lba,
                              uint32_t count, spdk_nvme_cmd_cb, void *, uint32_t flags)
    int spdk_nvme_ns_cmd_write(spdk_nvme_ns *, spdk_nvme_qpair *, void *payload, uint64_t lba,
                               uint32_t count, spdk_nvme_cmd_cb, void *, uint32_t flags)
    int spdk_nvme_ns_cmd_flush(spdk_nvme_ns *, spdk_nvme_qpair *, spdk_nvme_cmd_cb, void *)
    int spdk_nvme_ns_cmd_write_zeroes(spdk_nvme_ns *, spdk_nvme_qpair *, uint64_t lba,
                                      uint32_t count, spdk_nvme_cmd_cb, void *, uint32_t flags)
    int spdk_nvme_ns_cmd_compare(spdk_nvme_ns *, spdk_nvme_qpair *, void *payload, uint64_t lba,
                                 uint32_t count, spdk_nvme_cmd_cb, void *, uint32_t flags)
    int spdk_nvme_ns_cmd_dataset_management(spdk_nvme_ns *, spdk_nvme_qpair *, uint32_t type,
                                            const spdk_nvme_dsm_range *, uint16_t count,
                                            spdk_nvme_cmd_cb, void *)
