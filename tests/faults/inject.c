/* A disk that fails, loaded before libc: what happens instead of the n-th call of one kind on files with one name.

   INJECT="KIND PART NTH COUNT FAULT" in the environment, or inject("...") later on.
   KIND: read, write, allocate, or change (all that changes a disk: also making, cutting, renaming and removing).
   PART: calls on paths that contain it are counted, from 1; "-" for all.
   COUNT: how many calls fail from the NTH on; 0 for all.
   FAULT: EIO, ENOSPC, EINTR, UNSUPPORTED, SHORT (half of what was asked), STOP (until it is told to go on, before the
   call is made), KILL (likewise) or TEAR (half is written, then it is killed). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { SHORT = -1, STOP = -2, KILL = -3, TEAR = -4 };

static char kind[16], part[256];
static long nth, count;
static int fault;
static atomic_long counted;

void inject(const char *text) {
    char word[16];
    if (sscanf(text, "%15s %255s %ld %ld %15s", kind, part, &nth, &count, word) != 5) abort();
    const struct { const char *name; int fault; } known[] = {
        {"EIO", EIO}, {"ENOSPC", ENOSPC}, {"EINTR", EINTR}, {"UNSUPPORTED", EOPNOTSUPP},
        {"SHORT", SHORT}, {"STOP", STOP}, {"KILL", KILL}, {"TEAR", TEAR},
    };
    fault = 0;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(word, known[i].name)) fault = known[i].fault;
    if (!fault) abort();
    atomic_store(&counted, 0);
}

long injected(void) { return atomic_load(&counted); }

__attribute__((constructor)) static void begin(void) {
    if (getenv("INJECT")) inject(getenv("INJECT"));
}

/* The fault of this call, or 0. */
static int struck(const char *what, const char *path) {
    if (!fault || strcmp(kind, what)) return 0;
    if (strcmp(part, "-") && !strstr(path, part)) return 0;
    long n = atomic_fetch_add(&counted, 1) + 1;
    if (n < nth || (count && n >= nth + count)) return 0;
    if (fault == KILL) kill(getpid(), SIGKILL);
    if (fault == STOP) kill(getpid(), SIGSTOP);
    return fault == STOP ? 0 : fault;
}

static int struck_at(const char *what, int descriptor) {
    char link[64], path[4096];
    if (!fault || strcmp(kind, what)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    return struck(what, path);
}

#define REAL(name) static typeof(name) *real; if (!real) real = (typeof(name) *)dlsym(RTLD_NEXT, #name)
#define FAIL(found, error) do { int f = (found); if (f > 0) { errno = f; return error; } } while (0)
#define HALF(size) ((size) > 1 ? (size) / 2 : (size))

ssize_t read(int fd, void *data, size_t size) {
    REAL(read);
    int found = struck_at("read", fd);
    FAIL(found, -1);
    return real(fd, data, found ? HALF(size) : size);
}

ssize_t pread64(int fd, void *data, size_t size, off64_t offset) {
    REAL(pread64);
    int found = struck_at("read", fd);
    FAIL(found, -1);
    return real(fd, data, found ? HALF(size) : size, offset);
}

ssize_t preadv64v2(int fd, const struct iovec *parts, int n, off64_t offset, int flags) {
    REAL(preadv64v2);
    int found = struck_at("read", fd);
    FAIL(found, -1);
    struct iovec half = {parts->iov_base, HALF(parts->iov_len)};
    return found ? real(fd, &half, 1, offset, flags) : real(fd, parts, n, offset, flags);
}

ssize_t preadv64(int fd, const struct iovec *parts, int n, off64_t offset) {
    return preadv64v2(fd, parts, n, offset, 0);
}

static int torn(int found, int fd) {
    if (!found) found = struck_at("change", fd);
    return found;
}

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    int found = torn(struck_at("write", fd), fd);
    FAIL(found, -1);
    ssize_t written = real(fd, data, found ? HALF(size) : size);
    if (found == TEAR) kill(getpid(), SIGKILL);
    return written;
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    REAL(pwrite64);
    int found = torn(struck_at("write", fd), fd);
    FAIL(found, -1);
    ssize_t written = real(fd, data, found ? HALF(size) : size, offset);
    if (found == TEAR) kill(getpid(), SIGKILL);
    return written;
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) {
    REAL(sendfile64);
    int found = torn(struck_at("write", out), out);
    FAIL(found, -1);
    FAIL(struck_at("read", in), -1);
    if (found == TEAR) { /* of a file that fits into one call */
        struct stat file;
        fstat(in, &file);
        size = HALF((size_t)file.st_size);
    }
    ssize_t written = real(out, in, offset, found == SHORT ? HALF(size) : size);
    if (found == TEAR) kill(getpid(), SIGKILL);
    return written;
}

int posix_fallocate64(int fd, off64_t offset, off64_t size) {
    REAL(posix_fallocate64);
    int found = torn(struck_at("allocate", fd), fd);
    return found > 0 ? found : real(fd, offset, size);
}

int ftruncate64(int fd, off64_t size) {
    REAL(ftruncate64);
    FAIL(struck_at("change", fd), -1);
    return real(fd, size);
}

int fsync(int fd) {
    REAL(fsync);
    FAIL(struck_at("change", fd), -1);
    return real(fd);
}

int open64(const char *path, int flags, ...) {
    REAL(open64);
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
    va_end(more);
    FAIL(struck("open", path), -1);
    if (flags & O_CREAT) FAIL(struck("change", path), -1);
    return real(path, flags, mode);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    FAIL(struck("change", path), -1);
    return real(path, mode);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    FAIL(struck("change", from), -1);
    return real(from, to);
}

int unlink(const char *path) {
    REAL(unlink);
    FAIL(struck("change", path), -1);
    return real(path);
}

int unlinkat(int fd, const char *path, int flags) {
    REAL(unlinkat);
    FAIL(struck_at("change", fd), -1);
    return real(fd, path, flags);
}

int rmdir(const char *path) {
    REAL(rmdir);
    FAIL(struck("change", path), -1);
    return real(path);
}
