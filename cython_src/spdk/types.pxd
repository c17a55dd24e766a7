# A controller and its queue pairs, as threads share them.
#
# Only its driver uses a pair that has commands in flight. Everything else of a controller is used
# under `use`: by the controller's thread, and by Python threads for the duration of a call. To
# reset or reconnect a controller, its thread first makes every driver with commands in flight
# park; then it alone uses the pairs.

from libc.stdint cimport uint32_t, uint64_t

from backend cimport skv_backend, skv_io
from libspdk cimport *
from pthreads cimport pthread_cond_t, pthread_mutex_t, pthread_t


# What tells a namespace from another that took its number, or from itself after a format.
cdef struct Likeness:
    unsigned char identity[40]   # NGUID, UUID and EUI64
    uint64_t blocks
    uint32_t block_nbytes
    uint32_t metadata_nbytes


cdef enum Presence:
    PRESENT
    ABSENT     # the controller has no namespace of that number
    STRANGER   # another namespace has it, or its own one was formatted anew


cdef struct Reachable:
    size_t address
    size_t nbytes


cdef struct Pair:
    skv_backend backend
    Admin *admin
    Pair *next               # in the controller's list, guarded by the controller's mutex
    spdk_nvme_ns *ns
    spdk_nvme_qpair *pair    # NULL: not connected
    uint32_t nsid
    uint32_t block_shift
    Likeness likeness        # the namespace that was opened
    bint known               # the two above are set
    int presence             # whether the number is still that namespace's; nothing else is used
    uint32_t depth
    uint32_t segment_nbytes  # the largest command
    uint32_t in_flight
    skv_io *done
    skv_io *done_tail
    uint64_t reset_at_ns     # when a cancelled command is overdue; 0: never
    bint can_abort
    bint relaxes             # between polls: the target may run on this core's other thread
    bint woken
    bint broken              # the connection failed; the controller's thread will replace it
    bint held                # used by the driver only: it parked, and has not seen the end of that
    # Guarded by the controller's mutex:
    bint active              # has commands in flight: a driver polls it
    bint parked              # its driver does not use it
    # Memory that the controller reaches: changed by Python threads, read by submitting threads.
    pthread_mutex_t mutex
    Reachable *reachable
    uint32_t reachable_count
    uint32_t reachable_room


# SPDK hands the options' address to the callback that has the controller.
cdef struct Attempt:
    spdk_nvme_ctrlr_opts opts
    spdk_nvme_ctrlr *ctrlr


cdef struct Admin:
    spdk_nvme_transport_id trid
    Attempt attempt
    spdk_nvme_probe_ctx *context  # an attempt that did not end by its deadline
    spdk_nvme_ctrlr *ctrlr   # NULL: lost, not reconnected so far
    spdk_pci_device *pci     # NULL: the controller is not on PCIe
    unsigned char serial[20]
    bint by_register         # vfio-user: registers are read over a socket
    int line                 # our own descriptor of that socket; -1: there is none
    uint64_t connect_ns      # how long a connection may take
    uint64_t patience_ns     # and whatever else waits for an answer
    pthread_t thread
    pthread_mutex_t use
    pthread_mutex_t mutex    # never held over anything that blocks
    pthread_cond_t work
    pthread_cond_t state_changed  # a pair parked or became idle, or a reset ended
    Admin *next              # in the process's list, guarded by _admins_mutex
    bint stopping
    bint gone                # removed: nothing more is submitted
    bint out                 # its DMA is off: memory of commands in flight may be reused
    uint64_t gone_at_ns
    uint64_t asked_ns        # when the admin queue was last polled
    # Guarded by the mutex:
    Pair *pairs
    bint reset_requested     # or a reconnection
    int next_fate            # and its result for commands in flight: -EAGAIN (retry), -ENODEV
    bint resetting           # a reset is running
    int fate                 # and its result for commands in flight
    uint64_t tried_ns        # when the last reset ended
    uint64_t rebuilt         # the number of resets
