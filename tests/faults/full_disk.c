// For LD_PRELOAD: from its FULL_AFTER-th on, every write below the folder FULL_BELOW fails like one to a full disk. All
// processes count together, in the file FULL_COUNT of eight bytes.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int is_full(int descriptor) {
    const char *below = getenv("FULL_BELOW"), *count = getenv("FULL_COUNT"), *after = getenv("FULL_AFTER");
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    const ssize_t length = readlink(link, path, sizeof path);
    if (!below || !count || !after || length < (ssize_t)strlen(below) || strncmp(path, below, strlen(below))) return 0;
    static _Atomic long *counter;
    if (!counter) {
        const int file = open(count, O_RDWR);
        counter = mmap(NULL, sizeof *counter, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        close(file);
    }
    return atomic_fetch_add(counter, 1) + 1 >= atol(after);
}

ssize_t write(int descriptor, const void *bytes, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = (ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    if (is_full(descriptor)) {
        errno = ENOSPC;
        return -1;
    }
    return real(descriptor, bytes, size);
}
