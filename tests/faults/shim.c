/* Preloaded into a victim: makes its disk fail, its clock jump, and notes what a power loss would leave.
 *
 * FAULTS_FOLDER: only files below it are concerned. FAULTS_CONTROL: a file of five 64-bit numbers, mapped by both
 * sides: the mode, how much is left until or of the fault, seconds added to the wall clock, faults so far, and the
 * thousandths of the last write before a kill that still get out. FAULTS_SHADOW: a folder that gets a copy of each
 * file at each sync that succeeded, `NAME.listed` once the folder was synced with the file in it, and `NAME.gone`
 * with the ranges of bytes that a failed sync took along.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NOTHING, WRITE_ENOSPC, WRITE_EIO, SYNC_EIO, KILL_AT_WRITE, KILL_AT_FIRST_WRITE, KILL_AT_SYNC };
enum { MODE, LEFT, SHIFT, SEEN, PIECE, NUMBERS };

#define NAME_SIZE (PATH_MAX + 64)
#define REAL(name) \
    if (!real) real = dlsym(RTLD_NEXT, #name)

static volatile int64_t *control;
static const char *folder, *shadow;
static pthread_mutex_t syncing = PTHREAD_MUTEX_INITIALIZER;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAULTS_CONTROL");
    folder = getenv("FAULTS_FOLDER");
    shadow = getenv("FAULTS_SHADOW");
    int fd = path && folder && shadow ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *page = mmap(NULL, NUMBERS * sizeof(int64_t), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (page != MAP_FAILED) control = page;
}

static int ours(int fd, char *path) {
    char link[64];
    if (!control) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strncmp(path, folder, strlen(folder)) == 0;
}

/* Whether this call fails; a count below zero is for ever. */
static int applies(void) {
    if (control[LEFT] == 0) return 0;
    if (control[LEFT] > 0) __sync_fetch_and_sub(&control[LEFT], 1);
    __sync_fetch_and_add(&control[SEEN], 1);
    return 1;
}

static void die(void) {
    control[SEEN] = 1;
    kill(getpid(), SIGKILL);
}

static ssize_t raw_write(int fd, const void *data, size_t size, off_t offset) {
    static ssize_t (*write_it)(int, const void *, size_t);
    static ssize_t (*write_there)(int, const void *, size_t, off_t);
    if (!write_it) write_it = dlsym(RTLD_NEXT, "write");
    if (!write_there) write_there = dlsym(RTLD_NEXT, "pwrite");
    return offset < 0 ? write_it(fd, data, size) : write_there(fd, data, size, offset);
}

/* Every write ends here; an offset below zero stands for none. */
static ssize_t faulty_write(int fd, const void *data, size_t size, off_t offset) {
    char path[PATH_MAX];
    int mode = control ? (int)control[MODE] : NOTHING;
    if (mode == NOTHING || mode == SYNC_EIO || mode == KILL_AT_SYNC || !ours(fd, path))
        return raw_write(fd, data, size, offset);
    if (mode == WRITE_EIO && applies()) {
        errno = EIO;
        return -1;
    }
    if (mode == WRITE_ENOSPC) {
        /* So many bytes still fit. */
        int64_t left = __sync_fetch_and_sub(&control[LEFT], (int64_t)size);
        if (left < (int64_t)size) {
            __sync_fetch_and_add(&control[SEEN], 1);
            if (left > 0) return raw_write(fd, data, left, offset);
            errno = ENOSPC;
            return -1;
        }
    }
    if (mode == KILL_AT_WRITE || mode == KILL_AT_FIRST_WRITE) {
        struct stat found;
        int counts = mode == KILL_AT_WRITE || (!fstat(fd, &found) && found.st_size == 0);
        /* So many writes still succeed. */
        if (counts && __sync_fetch_and_sub(&control[LEFT], 1) <= 0) {
            size_t piece = size * control[PIECE] / 1000;
            if (piece) raw_write(fd, data, piece, offset);
            die();
        }
    }
    return raw_write(fd, data, size, offset);
}

ssize_t write(int fd, const void *data, size_t size) { return faulty_write(fd, data, size, -1); }

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return faulty_write(fd, data, size, offset); }

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    return faulty_write(fd, data, size, offset);
}

ssize_t writev(int fd, const struct iovec *pieces, int count) {
    static ssize_t (*real)(int, const struct iovec *, int);
    char path[PATH_MAX];
    REAL(writev);
    if (!control || control[MODE] == NOTHING || !ours(fd, path)) return real(fd, pieces, count);
    size_t size = 0, at = 0;
    for (int i = 0; i < count; i++) size += pieces[i].iov_len;
    char *joined = malloc(size ? size : 1);
    for (int i = 0; i < count; at += pieces[i++].iov_len) memcpy(joined + at, pieces[i].iov_base, pieces[i].iov_len);
    ssize_t result = faulty_write(fd, joined, size, -1);
    int error = errno;
    free(joined);
    errno = error;
    return result;
}

/* -- syncs ----------------------------------------------------------------------------------------------- */

static void shadow_name(char *name, const char *path, const char *suffix) {
    snprintf(name, NAME_SIZE, "%s/%s%s", shadow, strrchr(path, '/') + 1, suffix);
}

static off_t shadow_size(const char *path) {
    char name[NAME_SIZE];
    struct stat found;
    shadow_name(name, path, "");
    return stat(name, &found) ? 0 : found.st_size;
}

/* Copy the first `size` bytes of a file: no more were there when its sync began. */
static void keep(const char *path, off_t size) {
    char target[NAME_SIZE], part[NAME_SIZE], piece[65536];
    shadow_name(target, path, "");
    shadow_name(part, path, ".part");
    int in = open(path, O_RDONLY | O_CLOEXEC), out = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    off_t at = 0;
    while (in >= 0 && out >= 0 && at < size) {
        size_t most = size - at < (off_t)sizeof piece ? (size_t)(size - at) : sizeof piece;
        ssize_t got = pread(in, piece, most, at);
        if (got <= 0 || raw_write(out, piece, got, -1) != got) break;
        at += got;
    }
    if (in >= 0) close(in);
    if (out >= 0) close(out);
    if (in >= 0 && out >= 0) rename(part, target);
}

static void keep_names(const char *path) {
    char name[NAME_SIZE], file[NAME_SIZE];
    DIR *stream = opendir(path);
    struct dirent *entry;
    while (stream && (entry = readdir(stream))) {
        if (entry->d_name[0] == '.') continue;
        snprintf(file, sizeof file, "/%s", entry->d_name);
        shadow_name(name, file, ".listed");
        close(open(name, O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
    }
    if (stream) closedir(stream);
}

/* The kernel forgets what it could not write: it counts as clean, and the next sync succeeds without it. */
static void forget(const char *path, off_t size) {
    char name[NAME_SIZE], line[64];
    shadow_name(name, path, ".gone");
    int out = open(name, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    int length = snprintf(line, sizeof line, "%lld %lld\n", (long long)shadow_size(path), (long long)size);
    if (out >= 0 && raw_write(out, line, length, -1) != length) abort();
    if (out >= 0) close(out);
}

static int faulty_sync(int fd, int (*real)(int)) {
    char path[PATH_MAX];
    struct stat found;
    if (!ours(fd, path) || fstat(fd, &found)) return real(fd);
    pthread_mutex_lock(&syncing);
    int is_file = S_ISREG(found.st_mode), error = 0;
    fstat(fd, &found);
    if (control[MODE] == KILL_AT_SYNC && __sync_fetch_and_sub(&control[LEFT], 1) <= 0) die();
    if (control[MODE] == SYNC_EIO && applies()) {
        if (is_file) forget(path, found.st_size);
        error = EIO;
    } else if (real(fd)) {
        error = errno;
    } else if (is_file) {
        keep(path, found.st_size);
    } else {
        keep_names(path);
    }
    pthread_mutex_unlock(&syncing);
    if (!error) return 0;
    errno = error;
    return -1;
}

#define SYNCING(name)                    \
    int name(int fd) {                   \
        static int (*real)(int);         \
        REAL(name);                      \
        return faulty_sync(fd, real);    \
    }
SYNCING(fsync)
SYNCING(fdatasync)

/* -- the wall clock -------------------------------------------------------------------------------------- */

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    REAL(clock_gettime);
    int result = real(clock, now);
    if (!result && clock == CLOCK_REALTIME && control) now->tv_sec += control[SHIFT];
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    static int (*real)(struct timeval *, void *);
    REAL(gettimeofday);
    int result = real(now, zone);
    if (!result && control) now->tv_sec += control[SHIFT];
    return result;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result) *result = now.tv_sec;
    return now.tv_sec;
}
