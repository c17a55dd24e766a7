# The sockets of vfio-user: SPDK reads and writes them with calls that wait without end, it announces
# memory to each of them from whichever thread allocates, and it does not keep threads from taking
# each other's replies. So one thread at a time uses them, for a step that waits for nothing else,
# and whoever holds them too long has its socket shut down below it.
# Included in spdk.pyx: SPDK's state must exist once, also when linked statically.

cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    struct sockaddr:
        pass
    int AF_UNIX
    int SOCK_STREAM
    int SOCK_NONBLOCK
    int SOCK_CLOEXEC
    int SHUT_RDWR
    int MSG_NOSIGNAL
    int socket(int domain, int type, int protocol)
    int connect(int fd, const sockaddr *, socklen_t)
    int getpeername(int fd, sockaddr *, socklen_t *)
    int shutdown(int fd, int how)
    ssize_t send(int fd, const void *, size_t, int flags)
    ssize_t recv(int fd, void *, size_t, int flags)

cdef extern from "<sys/un.h>" nogil:
    struct sockaddr_un:
        int sun_family
        char sun_path[108]

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    short POLLIN, POLLHUP, POLLERR
    int poll(pollfd *, unsigned long count, int timeout_ms)

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<linux/sockios.h>" nogil:
    unsigned long SIOCOUTQ

cdef extern from "<fcntl.h>" nogil:
    int fcntl(int fd, int command, ...)
    int F_DUPFD_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    int usleep(unsigned int microseconds)

cdef extern from "<string.h>" nogil:
    size_t strlen(const char *)
    int strcmp(const char *, const char *)

cdef extern from "<dirent.h>" nogil:
    ctypedef struct DIR:
        pass
    struct dirent:
        char d_name[256]
    DIR *opendir(const char *)
    dirent *readdir(DIR *)
    int closedir(DIR *)

cdef extern from "<stdlib.h>" nogil:
    int atoi(const char *)

# How long a step may take, and between two looks at that. It may be hundreds of messages.
DEF STEP_MS = 8000
DEF LOOK_NS = 500_000_000
# Between two steps of one procedure: others use the sockets, and the target's core its time.
DEF STEP_US = 50
# vfio-user's VERSION (vfio-user 0.9.2), as SPDK sends it.
DEF VERSION = 1
DEF HEADER_NBYTES = 16
# Sockets of this kind at most.
DEF LINES = 1024

# Held for a step.
cdef pthread_mutex_t _socket
pthread_mutex_init(&_socket, NULL)
cdef uint64_t _held_since_ns   # 0: by nobody
# Whether memory that is allocated or freed may be announced: not where all was taken at once.
cdef bint _announces
cdef bint _watched


cdef inline uint64_t _ms(uint64_t ms) noexcept nogil:
    return ms * 1_000_000


cdef void _hold() noexcept nogil:
    global _held_since_ns
    pthread_mutex_lock(&_socket)
    _held_since_ns = skv_now_ns()


cdef void _let_go() noexcept nogil:
    global _held_since_ns
    _held_since_ns = 0
    pthread_mutex_unlock(&_socket)


cdef void _hold_for_memory() noexcept nogil:
    if _announces:
        _hold()


cdef void _let_go_for_memory() noexcept nogil:
    if _announces:
        _let_go()


cdef int _lines(int *found) noexcept nogil:
    """The descriptors of all vfio-user sockets of this process; returns their number."""
    cdef DIR *folder = opendir("/proc/self/fd")
    cdef dirent *entry
    cdef sockaddr_un peer
    cdef socklen_t nbytes
    cdef size_t length
    cdef int fd, count = 0
    if folder == NULL:
        return 0
    while count < LINES:
        entry = readdir(folder)
        if entry == NULL:
            break
        fd = atoi(entry.d_name)
        nbytes = sizeof(peer) - 1
        memset(&peer, 0, sizeof(peer))
        if getpeername(fd, <sockaddr *>&peer, &nbytes) or peer.sun_family != AF_UNIX:
            continue
        length = strlen(peer.sun_path)
        if length >= 6 and strcmp(peer.sun_path + length - 6, "/cntrl") == 0:
            found[count] = fd
            count += 1
    closedir(folder)
    return count


cdef int _new_line(const int *before, int count) noexcept nogil:
    """A descriptor of our own for the socket that was not among `before`; -1: there is none."""
    cdef int now[LINES]
    cdef int found = _lines(now), i, j
    for i in range(found):
        j = 0
        while j < count and before[j] != now[i]:
            j += 1
        if j == count:
            return fcntl(now[i], F_DUPFD_CLOEXEC, 3)
    return -1


cdef bint _is_down(int line) noexcept nogil:
    """Whether the target closed its end, or is gone."""
    cdef pollfd look
    look.fd = line
    look.events = 0
    look.revents = 0
    return poll(&look, 1, 0) > 0 and look.revents & (POLLHUP | POLLERR)


cdef void _cut_lines() noexcept nogil:
    """Shuts down the sockets with a message that the target has not even taken, or else all."""
    cdef int found[LINES]
    cdef int count = _lines(found), i, unread, cut = 0
    for i in range(count):
        unread = 0
        if ioctl(found[i], SIOCOUTQ, &unread) == 0 and unread > 0:
            shutdown(found[i], SHUT_RDWR)
            cut += 1
    for i in range(count if not cut else 0):
        shutdown(found[i], SHUT_RDWR)


cdef void *_watch(void *argument) noexcept nogil:
    cdef uint64_t since
    while True:
        usleep(LOOK_NS // 1000)
        since = _held_since_ns
        if since and skv_now_ns() - since > _ms(STEP_MS):
            _cut_lines()
    return NULL


cdef void _start_watch() noexcept nogil:
    """Once there is a vfio-user controller. With the sockets held."""
    global _watched
    cdef pthread_t thread
    if not _watched and start_thread(&thread, _watch, NULL) == 0:
        _watched = True
        pthread_detach(thread)


cdef int _knock(const char *folder, uint64_t until_ns) noexcept nogil:
    """Whether a vfio-user target answers, found out on a connection of our own. It serves one
    process at a time, and leaves others waiting. 0, or -errno (-ETIMEDOUT: it does not)."""
    cdef sockaddr_un at
    cdef pollfd look
    cdef unsigned char message[HEADER_NBYTES + 4]
    cdef uint64_t now
    cdef int fd, rc
    memset(&at, 0, sizeof(at))
    at.sun_family = AF_UNIX
    if <size_t>snprintf(at.sun_path, sizeof(at.sun_path), "%s/cntrl", folder) >= sizeof(at.sun_path):
        return -ENAMETOOLONG
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    if fd < 0:
        return -errno
    while True:
        rc = -errno if connect(fd, <sockaddr *>&at, sizeof(at)) else 0
        if rc != -EAGAIN or skv_now_ns() > until_ns:
            break
        usleep(1000)
    if rc == 0:
        memset(message, 0, sizeof(message))
        (<uint16_t *>message)[1] = VERSION
        (<uint32_t *>message)[1] = sizeof(message)
        if send(fd, message, sizeof(message), MSG_NOSIGNAL) != sizeof(message):
            rc = -errno
    if rc == 0:
        look.fd = fd
        look.events = POLLIN
        now = skv_now_ns()
        rc = poll(&look, 1, <int>((until_ns - now) // 1000000) if until_ns > now else 0)
        if rc > 0:
            rc = 0 if recv(fd, message, HEADER_NBYTES, 0) == HEADER_NBYTES else -ECONNRESET
        elif rc == 0:
            rc = -ETIMEDOUT
        else:
            rc = -errno
    close(fd)
    return -ETIMEDOUT if rc == -EAGAIN else rc
