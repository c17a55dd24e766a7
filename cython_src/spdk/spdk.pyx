# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""SPDK's user-space NVMe driver: the environment, controllers, and the queue pair as a backend.

The transports are PCIe (the drive is bound to vfio-pci), vfio-user and TCP. Nothing here blocks
with the GIL held.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.pycapsule cimport PyCapsule_New
from libc.errno cimport (
    EAGAIN, ECONNRESET, ENAMETOOLONG, ENODEV, ENOMEM, ENXIO, ETIMEDOUT, errno,
)
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset

from backend cimport (
    SKV_BACKEND_CAPSULE, SKV_DISCARD, SKV_FLUSH, SKV_NVME_STATUS, SKV_READ, SKV_WRITE, skv_backend,
    skv_io, skv_now_ns, skv_relax,
)
from pthreads cimport (
    init_cond, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_t, pthread_detach,
    pthread_join,    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t,
    pthread_mutex_trylock, pthread_mutex_unlock, pthread_t, start_thread, wait_until,
)
from libspdk cimport *
from spdk.types cimport *

SPDK_VERSION = SPDK_VERSION_STRING.decode()

# Included rather than compiled separately: the state of SPDK (if linked statically) and of this
# driver must exist once per process, and a second extension would have its own copy.
include "sigbus.pxi"
include "sockets.pxi"
include "env.pxi"
include "removal.pxi"
include "namespaces.pxi"
include "connection.pxi"
include "recovery.pxi"
include "controller.pxi"
include "queue.pxi"
