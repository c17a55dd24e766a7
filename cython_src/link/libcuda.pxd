# The part of the CUDA driver's interface that the link uses, as pointers that dlsym fills in:
# building needs no CUDA header.

ctypedef int CUresult
ctypedef int CUdevice
ctypedef void *CUcontext
ctypedef void *CUstream
ctypedef void *CUevent
ctypedef unsigned long long CUdeviceptr

cdef enum:
    CUDA_SUCCESS = 0
    CUDA_ERROR_NOT_READY = 600
    CU_STREAM_NON_BLOCKING = 1
    CU_EVENT_DISABLE_TIMING = 2
    CU_MEMHOSTREGISTER_PORTABLE = 1
    CU_STREAM_CAPTURE_MODE_RELAXED = 2

cdef struct Cuda:
    CUresult (*Init)(unsigned flags) noexcept nogil
    CUresult (*GetErrorName)(CUresult error, const char **name) noexcept nogil
    CUresult (*GetErrorString)(CUresult error, const char **text) noexcept nogil
    CUresult (*DeviceGet)(CUdevice *device, int ordinal) noexcept nogil
    CUresult (*DeviceGetName)(char *name, int nbytes, CUdevice device) noexcept nogil
    CUresult (*DevicePrimaryCtxRetain)(CUcontext *context, CUdevice device) noexcept nogil
    CUresult (*DevicePrimaryCtxRelease)(CUdevice device) noexcept nogil
    CUresult (*CtxGetCurrent)(CUcontext *context) noexcept nogil
    CUresult (*CtxPushCurrent)(CUcontext context) noexcept nogil
    CUresult (*CtxPopCurrent)(CUcontext *context) noexcept nogil
    CUresult (*ThreadExchangeStreamCaptureMode)(int *mode) noexcept nogil
    CUresult (*StreamCreate)(CUstream *stream, unsigned flags) noexcept nogil
    CUresult (*StreamDestroy)(CUstream stream) noexcept nogil
    CUresult (*StreamSynchronize)(CUstream stream) noexcept nogil
    CUresult (*StreamWaitEvent)(CUstream stream, CUevent event, unsigned flags) noexcept nogil
    CUresult (*EventCreate)(CUevent *event, unsigned flags) noexcept nogil
    CUresult (*EventDestroy)(CUevent event) noexcept nogil
    CUresult (*EventRecord)(CUevent event, CUstream stream) noexcept nogil
    CUresult (*EventQuery)(CUevent event) noexcept nogil
    CUresult (*MemHostRegister)(void *host, size_t nbytes, unsigned flags) noexcept nogil
    CUresult (*MemHostUnregister)(void *host) noexcept nogil
    CUresult (*MemAlloc)(CUdeviceptr *device, size_t nbytes) noexcept nogil
    CUresult (*MemFree)(CUdeviceptr device) noexcept nogil
    CUresult (*MemcpyHtoDAsync)(CUdeviceptr to, const void *source, size_t nbytes,
                                CUstream stream) noexcept nogil
    CUresult (*MemcpyDtoHAsync)(void *to, CUdeviceptr source, size_t nbytes,
                                CUstream stream) noexcept nogil
