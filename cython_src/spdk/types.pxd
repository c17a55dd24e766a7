# A controller and its queue pairs, as the threads that meet there share them.
#
# Who may touch what. A pair that has commands in flight is its driver's alone. Everything else of
# a controller is used under `use`: by the controller's own thread, and by Python threads for as
# long as a call takes. When a controller has to be reset or connected anew, its thread first lets
# every driver with commands in flight park; then all pairs are its own.

from libc.stdint cimport uint32_t, uint64_t

from backend cimport skv_backend, skv_io
from libspdk cimport *
from pthreads cimport pthread_cond_t, pthread_mutex_t, pthread_t


cdef struct Reachable:
    size_t address
    size_t nbytes


cdef struct Pair:
    skv_backend backend
    Admin *admin
    Pair *next               # of the controller's pairs; guarded by the controller's mutex
    spdk_nvme_ns *ns
    spdk_nvme_qpair *pair    # NULL: there is no connection just now
    uint32_t nsid
    uint32_t block_nbytes
    uint32_t block_shift
    uint64_t blocks
    unsigned char identity[40]   # NGUID, UUID and EUI64: what has to come back after a reset
    bint known               # the four above are set
    bint stranger            # another namespace answers to that number now
    uint32_t depth
    uint32_t in_flight
    skv_io *done
    skv_io *done_tail
    uint64_t reset_at_ns     # a cancelled command is overdue then; 0: none is
    bint can_abort
    bint relaxes             # between two polls: the target may run on this core's other thread
    bint woken
    bint broken              # the connection failed; its driver waits for the controller's thread
    bint held                # the driver's own: it parked, and has not seen yet that it may go on
    # Guarded by the controller's mutex:
    bint active              # has commands in flight, so that a driver polls it
    bint parked              # its driver keeps off
    # Memory that the controller reaches: changed by Python threads, read by those that submit.
    pthread_mutex_t mutex
    Reachable *reachable
    uint32_t reachable_count
    uint32_t reachable_room


cdef struct Admin:
    spdk_nvme_transport_id trid
    spdk_nvme_ctrlr_opts opts
    spdk_nvme_ctrlr *ctrlr   # NULL: lost, and not found again so far
    spdk_pci_device *pci     # NULL: the controller is not on PCIe
    unsigned char serial[20]
    bint by_register         # over vfio-user a dead target shows in nothing but its registers
    pthread_t thread
    pthread_mutex_t use
    pthread_mutex_t mutex    # never held over anything that blocks
    pthread_cond_t stop_asked
    pthread_cond_t calm      # a driver parked or let go; or the controller's thread is through
    Admin *next              # of the process's controllers; guarded by _admins_mutex
    bint stopping
    bint gone                # nothing is submitted any more
    bint out                 # it reaches no memory any more: what is in flight may be taken back
    uint64_t gone_at_ns
    # Guarded by the mutex:
    Pair *pairs
    bint asked               # for a reset, or a new connection
    int wish                 # what that means for what is in flight: -EAGAIN (once more), -ENODEV
    bint resetting           # one is under way
    int fate                 # and means that
    uint64_t tried_ns        # when the last one ended
    uint64_t rebuilt         # how many there were
