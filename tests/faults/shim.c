/* Preloaded into a victim: makes its disk fail, its clock jump, and notes what a power loss would leave.
 *
 * FAULTS_FOLDER: only files below it are concerned. FAULTS_CONTROL: a file of five 64-bit numbers, mapped by both
 * sides: the mode, how often it still applies, seconds added to the wall clock, faults so far, and spare.
 * FAULTS_SHADOW: a folder that gets a copy of each file at each sync that succeeded.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { NOTHING, WRITE_ENOSPC, WRITE_EIO, SYNC_EIO, KILL_AT_WRITE, KILL_AT_MAIN_WRITE };

static volatile int64_t *control;
static const char *folder, *shadow;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAULTS_CONTROL");
    folder = getenv("FAULTS_FOLDER");
    shadow = getenv("FAULTS_SHADOW");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *page = mmap(NULL, 5 * sizeof(int64_t), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (page != MAP_FAILED) control = page;
}

static int ours(int fd, char *path) {
    char link[64];
    if (!control || !folder) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strncmp(path, folder, strlen(folder)) == 0;
}

/* Whether this call fails; a count below zero is for ever. */
static int applies(void) {
    if (control[1] == 0) return 0;
    if (control[1] > 0) __sync_fetch_and_sub(&control[1], 1);
    __sync_fetch_and_add(&control[3], 1);
    return 1;
}

static int write_fault(int fd) {
    char path[PATH_MAX];
    int mode = control ? (int)control[0] : NOTHING;
    if (mode == NOTHING || mode == SYNC_EIO || !ours(fd, path)) return 0;
    size_t length = strlen(path);
    if (mode == KILL_AT_MAIN_WRITE && (length < 6 || strcmp(path + length - 6, ".spool"))) return 0;
    if (mode == KILL_AT_WRITE || mode == KILL_AT_MAIN_WRITE) {
        /* The count is of writes that still succeed. */
        if (__sync_fetch_and_sub(&control[1], 1) <= 0) {
            control[3] = 1;
            kill(getpid(), SIGKILL);
        }
        return 0;
    }
    return applies() ? (mode == WRITE_ENOSPC ? ENOSPC : EIO) : 0;
}

static void keep(const char *path) {
    char target[PATH_MAX + 64], part[PATH_MAX + 80], piece[65536];
    const char *name = strrchr(path, '/') + 1;
    snprintf(target, sizeof target, "%s/%s", shadow, name);
    snprintf(part, sizeof part, "%s.part.%d", target, (int)getpid());
    int in = open(path, O_RDONLY | O_CLOEXEC);
    int out = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    ssize_t got = -1;
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    while (in >= 0 && out >= 0 && (got = read(in, piece, sizeof piece)) > 0)
        if (real(out, piece, got) != got) { got = -1; break; }
    if (in >= 0) close(in);
    if (out >= 0) close(out);
    if (got == 0) rename(part, target);
}

#define FAIL(code) do { int fault = (code); if (fault) { errno = fault; return -1; } } while (0)

ssize_t write(int fd, const void *data, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    FAIL(write_fault(fd));
    return real(fd, data, size);
}

#define POSITIONED(name, type)                                        \
    ssize_t name(int fd, const void *data, size_t size, type offset) { \
        static ssize_t (*real)(int, const void *, size_t, type);       \
        if (!real) real = dlsym(RTLD_NEXT, #name);                     \
        FAIL(write_fault(fd));                                         \
        return real(fd, data, size, offset);                           \
    }
POSITIONED(pwrite, off_t)
POSITIONED(pwrite64, off64_t)

#define SYNCING(name)                                                                   \
    int name(int fd) {                                                                  \
        static int (*real)(int);                                                        \
        char path[PATH_MAX];                                                            \
        if (!real) real = dlsym(RTLD_NEXT, #name);                                      \
        if (!ours(fd, path)) return real(fd);                                           \
        if (control[0] == SYNC_EIO && applies()) { errno = EIO; return -1; }            \
        int result = real(fd);                                                          \
        struct stat found;                                                              \
        if (!result && shadow && !fstat(fd, &found) && S_ISREG(found.st_mode)) keep(path); \
        return result;                                                                  \
    }
SYNCING(fsync)
SYNCING(fdatasync)

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (!result && clock == CLOCK_REALTIME && control) now->tv_sec += control[2];
    return result;
}
