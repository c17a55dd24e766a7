# The loop's structures and constants. Plain C, because the driver runs without the GIL.
from cpython.ref cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from posix.time cimport clockid_t

from backend cimport SKV_BUCKETS, SKV_OPS, iovec, skv_backend, skv_io
from gpu_link cimport skv_copy, skv_link
from pthreads cimport pthread_cond_t, pthread_mutex_t, pthread_t

cdef enum:
    # Bytes of the largest command: its result is an int32.
    MOST_SEGMENT_NBYTES = 1 << 30
    # Pieces, segments and checksums of a transfer, which are counted in uint32.
    MOST_COUNT = 1 << 30
    # Most bytes, and commands, of a transfer that its caller submits itself.
    LONE_NBYTES = 1 << 20
    LONE_COUNT = 8
    # A driver in a Python thread checks for signals this often.
    SLICE_NS = 50_000_000
    # Pieces up to this size go through a slot together where they follow each other on the drive
    # and lie apart in memory: to copy one costs no more than to pin its pages.
    SMALL_NBYTES = 32 << 10
    # Bytes copied, then summed: a page, because hardware prefetching stops at a page's end.
    COPY_BLOCK_NBYTES = 4096
    # Bytes moved by one memcpy (_move has the reason).
    MOVE_NBYTES = 4096
    # Completions taken from the engine at once.
    BATCH = 64
    # With GATHER_FROM commands in flight and no other work, the loop waits for an eighth of them, at
    # most GATHER: to be woken costs the processor that completes a small command about as much as
    # the command. Where so many do not end within GATHER_NS it waits for single ones, GATHER_AFTER
    # times.
    GATHER = 8
    GATHER_FROM = 24
    GATHER_NS = 200_000
    GATHER_AFTER = 64
    # Shortest and longest time between two polls of an overdue copy.
    COPY_POLL_NS = 50_000
    COPY_POLL_MAX_NS = 1_000_000
    # Commands submitted per reading of the clock, which takes a fifth of a small command's time.
    CLOCK_USES = 8
    # Sleeps shorter than this last longer than requested.
    SLEEP_MIN_NS = 20_000
    # Outcomes of transfers over links that are kept for Queue.outcomes.
    OUTCOMES = 256
    # Transfers searched for one that can continue while others wait for a slot.
    TODO_SEARCH_LIMIT = 64


cdef struct Segment:
    skv_io io              # first, so that the engine's pointer is ours
    Transfer_ *transfer
    unsigned char *user    # the caller's bytes
    unsigned char *slot    # its place in a bounce slot, or NULL: the drive reaches the caller's memory
    uint64_t offset        # where on the drive the segment starts (whole blocks)
    uint32_t drive_nbytes  # what the drive moves: whole blocks
    uint32_t skip          # drive bytes before the caller's
    uint32_t nbytes        # the caller's bytes
    uint32_t moved         # drive bytes moved so far
    uint32_t crc           # of the caller's bytes, if there are no chunks
    uint32_t *chunk_crcs   # one per chunk of this segment, or NULL
    uint32_t followers     # how many segments behind it its command moves as well
    uint32_t behind        # how many segments before it is the one whose command, or slot, it shares
    uint32_t holders       # segments with bytes in its slot that are not finished
    uint8_t bounce         # needs a slot
    uint8_t io_done
    uint8_t failed
    uint8_t queued         # on the follow-up list
    uint8_t in_flight
    uint8_t copying        # between slot and GPU memory
    # Two lists, because a write may wait for its checksum and for a retry at the same time.
    Segment *next_follow_up
    Segment *next_retry


# A segment's copy over a link; only transfers with a link have these.
cdef struct Copy:
    skv_copy copy          # first, so that the link's pointer is ours
    Segment *segment
    uint64_t started_ns
    Copy *next


cdef struct Piece:
    uint64_t offset
    unsigned char *address
    uint64_t nbytes
    uint64_t capacity      # usable bytes at address, at least nbytes
    uint32_t first_segment
    uint32_t segments
    uint32_t first_chunk
    uint32_t chunks


cdef struct Transfer_:
    Queue_ *queue
    PyObject *kept         # a list: everything the drive may touch, alive until `done`
    PyObject *handle       # the Transfer (an owned reference), if the reaper returns it
    uint32_t *crcs         # of all chunks of all pieces
    Segment *segments
    iovec *places          # the caller's memory of each segment; NULL: of one per command
    uint32_t count
    uint32_t next          # first segment not yet submitted
    uint32_t outstanding   # submitted and not finished
    uint32_t chunk_nbytes  # granularity of checksums; 0: one per piece
    uint32_t segment_nbytes
    uint32_t window        # most segments outstanding at once; 0: no limit
    skv_link *link         # NULL: the callers' memory is the host's
    uint32_t plan          # key of its outcome; 0: not recorded
    uint64_t nbytes        # the caller's, of all pieces
    uint64_t started_ns      # when it was submitted
    Copy *copies           # one per segment
    uint32_t to_copy       # copies not started
    uint32_t to_hand_over  # segments whose copy has not started, or that are not summed
    void *mark             # event that the first copy waits for, or NULL
    void *copied           # event of the last copy, where it is handed over
    uint8_t hand_over      # waiting ends with `issued`
    uint8_t op
    uint8_t checksum
    uint8_t priority
    uint8_t listed         # 1 + the priority whose to-do list it is on; 0: on none
    # Guarded by the queue's mutex:
    uint8_t done           # nothing of it is in flight
    uint8_t expired        # deadline passed
    uint8_t issued         # all is copied, or will be before `copied`
    uint8_t cancelled      # to be stopped
    uint8_t notified       # the reaper has it, or will
    uint8_t orphan         # its Transfer is gone: free it when done
    int status             # first errno
    uint32_t failed_segment
    uint64_t cold_nbytes   # read, and not found in the engine's cache
    uint64_t deadline_ns   # 0: none
    pthread_cond_t finished
    Transfer_ *next_incoming
    Transfer_ *next_todo
    Transfer_ *previous    # in the list of all that the driver has taken
    Transfer_ *following


# Of one operation.
cdef struct OpCounters:
    uint64_t ios
    uint64_t nbytes        # that the drive moved
    uint64_t latency_ns    # sum over all commands; over busy_ns it is the mean depth
    uint64_t transfers
    uint64_t errors        # of those transfers
    uint64_t took_ns       # sum over all transfers, from submission to end
    uint64_t latency[SKV_BUCKETS]
    uint64_t took[SKV_BUCKETS]


cdef struct Counters:
    OpCounters ops[SKV_OPS]
    uint64_t bounced
    uint64_t busy_ns       # time with something in flight
    uint64_t deepest
    uint64_t copies
    uint64_t to_device_nbytes
    uint64_t from_device_nbytes
    uint64_t copy_busy_ns  # time with a copy on its way
    uint64_t overlap_ns    # and something in flight on the drive


# How long a transfer over a link took, from its submission or from the end of the one before it,
# whichever was later.
cdef struct Outcome:
    uint32_t plan
    uint64_t nbytes
    uint64_t took_ns


cdef struct Queue_:
    skv_backend *backend
    pthread_mutex_t mutex
    pthread_cond_t work        # for the queue's own thread
    pthread_cond_t reapable    # for the reaper
    pthread_cond_t nap         # for a driver that waits only for copies
    pthread_t thread
    # Guarded by the mutex:
    uint8_t driven             # a thread is the driver
    uint8_t polling            # the driver may sleep: 1 in the engine, 2 on `nap`
    uint8_t attention          # the driver has something to take; it checks without the mutex
    uint8_t changed            # a priority or a cancellation has to be applied
    uint8_t asked              # the engine has to be served
    uint8_t started            # the thread has started
    uint8_t stopping
    uint8_t stopped
    uint8_t reap_stop
    uint8_t giving_up          # close() ran out of time: release all waiters
    uint8_t gave_up
    Transfer_ *incoming
    Transfer_ *incoming_tail
    Transfer_ *reap            # done, for the reaper
    Transfer_ *orphans         # done, to be freed by the next thread with the GIL
    uint64_t active            # transfers submitted and not done
    uint64_t outcomes_count    # since the queue was opened; the last ones are kept
    Outcome outcomes[OUTCOMES]
    unsigned char **more_slots # for the driver to take
    uint32_t more_slots_count
    uint32_t slots_count       # with those
    # The driver's own:
    Transfer_ *all
    Transfer_ *todo[2]         # with segments to submit, by priority
    Transfer_ *todo_tail[2]
    Segment *retry
    Segment *follow_up
    Segment *follow_up_tail
    uint32_t in_flight
    uint32_t depth
    unsigned char **slots
    uint32_t free_slots
    uint8_t more               # _refill stopped early: there is more to submit
    uint8_t singly             # for how many waits more not to wait for several completions
    uint32_t linked            # taken transfers that have a link
    uint32_t copies            # copies on their way
    Copy *copying
    Copy *copying_tail
    Segment *ready             # to be written: their bytes are in their slots
    Segment *ready_tail
    uint64_t link_free_ns[2]   # when to expect the last copy's end, by direction
    uint64_t copy_since_ns
    uint64_t overlap_since_ns
    uint64_t ended_ns          # end of the last transfer over a link
    uint64_t clock_ns          # the cached time, and how often it may still be used
    uint32_t clock_uses
    uint64_t busy_since_ns
    uint8_t deadlines          # a taken transfer has one
    # Fixed:
    uint32_t block_nbytes
    uint32_t align_nbytes
    uint32_t segment_nbytes
    uint8_t bound              # only the queue's own thread drives
    uint8_t exclusive          # one transfer at a time
    Queue_ *home               # of a lone queue the one that it belongs to, or itself
    int refused                # -errno of the engine's bind
    clockid_t cpu_clock        # CPU time of the queue's own thread
    Counters counters
