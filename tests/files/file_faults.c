/* What a disk can do to a process. Preloaded, this library counts the calls that touch files below one directory, and
 * at the n-th call it kills the process or lets the call fail. file_faults.py builds and drives it.
 *
 * Calls inside libc (fopen calls open, fwrite calls write) do not come through here. Python, Rust and libstdc++, which
 * write a run's files, call from outside. strace sees the same calls and one more: safetensors renames its file with a
 * system call of its own, within a directory that is itself still scratch.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <unistd.h>

/* DIE: before the call. HALF: after half of a write, or after any other whole call. FAIL: the call fails, once.
 * FAIL_ON: it fails, after half of a write, and so does every later call. */
enum { COUNT, DIE, HALF, FAIL, FAIL_ON };

static char root[PATH_MAX];
static long calls, target;
static int kind, error, log_to = -1;

void faults_arm(const char *directory, long n, int what, int number, int log_descriptor) {
  snprintf(root, sizeof root, "%s", directory);
  calls = 0, target = n, kind = what, error = number, log_to = log_descriptor;
}

long faults_calls(void) { return calls; }

/* Write the absolute path of name, relative to directory, or of directory itself if name is NULL. Return 0 if none. */
static int resolve(int directory, const char *name, char *path) {
  path[0] = 0;
  if (name && name[0] == '/') return snprintf(path, PATH_MAX, "%s", name) < PATH_MAX;
  char link[64];
  if (directory == AT_FDCWD) strcpy(link, "/proc/self/cwd");
  else snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
  long length = syscall(SYS_readlink, link, path, PATH_MAX - 1);
  if (length <= 0) return 0;
  path[length] = 0;
  if (!name) return 1;
  return snprintf(path + length, PATH_MAX - length, "/%s", name) < PATH_MAX - length;
}

static int below(const char *path) {
  size_t length = strlen(root);
  return !strncmp(path, root, length) && (path[length] == 0 || path[length] == '/');
}

/* Decide what happens to this call: 0 it runs, -1 it fails with errno set, HALF. It may not return. */
static int fate(const char *name, int directory, const char *file) {
  int before = errno;
  char path[PATH_MAX];
  if (!root[0] || !resolve(directory, file, path) || !below(path)) {
    errno = before;
    return 0;
  }
  calls++;
  if (log_to >= 0) {
    char line[PATH_MAX + 32];
    int length = snprintf(line, sizeof line, "%s %s\n", name, path + strlen(root));
    syscall(SYS_write, log_to, line, length);
  }
  errno = before;
  if (kind == COUNT || calls < target) return 0;
  if (calls > target && kind != FAIL_ON) return 0;
  if (kind == DIE) syscall(SYS_exit_group, 137);
  if (kind == HALF || (kind == FAIL_ON && calls == target && !strcmp(name, "write"))) return HALF;
  errno = error;
  return -1;
}

static void die_if_half(int what) {
  if (what == HALF) syscall(SYS_exit_group, 137);
}

#define REAL(type, name) static type (*real)() = 0; if (!real) real = (type(*)())dlsym(RTLD_NEXT, #name)

/* A call without a length. */
#define CALL(type, function, parameters, arguments, shown, directory, file)                                          \
  type function parameters {                                                                                         \
    REAL(type, function);                                                                                            \
    int what = fate(shown, directory, file);                                                                         \
    if (what < 0) return (type)-1;                                                                                   \
    type result = real arguments;                                                                                    \
    die_if_half(what);                                                                                               \
    return result;                                                                                                   \
  }

/* Opening to read counts too, under another name. It can fail; dying there is the same as dying at the call before. */
#define OPENED(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC) ? "open" : "look")
#define MODE(flags, last) \
  mode_t mode = 0; if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list v; va_start(v, last); mode = va_arg(v, mode_t); va_end(v); }
#define OPEN(function)                                                                                               \
  int function(const char *file, int flags, ...) {                                                                   \
    REAL(int, function);                                                                                             \
    MODE(flags, flags)                                                                                               \
    int what = fate(OPENED(flags), AT_FDCWD, file);                                                                  \
    if (what < 0) return -1;                                                                                         \
    int result = real(file, flags, mode);                                                                            \
    die_if_half(what);                                                                                               \
    return result;                                                                                                   \
  }
#define OPENAT(function)                                                                                             \
  int function(int at, const char *file, int flags, ...) {                                                           \
    REAL(int, function);                                                                                             \
    MODE(flags, flags)                                                                                               \
    int what = fate(OPENED(flags), at, file);                                                                        \
    if (what < 0) return -1;                                                                                         \
    int result = real(at, file, flags, mode);                                                                        \
    die_if_half(what);                                                                                               \
    return result;                                                                                                   \
  }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
CALL(FILE *, fopen, (const char *file, const char *mode), (file, mode), strpbrk(mode, "wa+") ? "open" : "look", AT_FDCWD, file)
CALL(FILE *, fopen64, (const char *file, const char *mode), (file, mode), strpbrk(mode, "wa+") ? "open" : "look", AT_FDCWD, file)
CALL(int, creat, (const char *file, mode_t mode), (file, mode), "open", AT_FDCWD, file)
CALL(int, creat64, (const char *file, mode_t mode), (file, mode), "open", AT_FDCWD, file)
CALL(int, mkdir, (const char *file, mode_t mode), (file, mode), "mkdir", AT_FDCWD, file)
CALL(int, mkdirat, (int at, const char *file, mode_t mode), (at, file, mode), "mkdir", at, file)
CALL(int, rmdir, (const char *file), (file), "rmdir", AT_FDCWD, file)
CALL(int, unlink, (const char *file), (file), "unlink", AT_FDCWD, file)
CALL(int, unlinkat, (int at, const char *file, int flags), (at, file, flags), flags ? "rmdir" : "unlink", at, file)
CALL(int, remove, (const char *file), (file), "unlink", AT_FDCWD, file)
CALL(int, rename, (const char *from, const char *to), (from, to), "rename", AT_FDCWD, to)
CALL(int, renameat, (int a, const char *from, int at, const char *to), (a, from, at, to), "rename", at, to)
CALL(int, renameat2, (int a, const char *from, int at, const char *to, unsigned f), (a, from, at, to, f), "rename", at, to)
CALL(int, link, (const char *from, const char *to), (from, to), "link", AT_FDCWD, to)
CALL(int, linkat, (int a, const char *from, int at, const char *to, int f), (a, from, at, to, f), "link", at, to)
CALL(int, symlink, (const char *from, const char *to), (from, to), "link", AT_FDCWD, to)
CALL(int, symlinkat, (const char *from, int at, const char *to), (from, at, to), "link", at, to)
CALL(int, chmod, (const char *file, mode_t mode), (file, mode), "chmod", AT_FDCWD, file)
CALL(int, fchmod, (int at, mode_t mode), (at, mode), "chmod", at, NULL)
CALL(int, fchmodat, (int at, const char *file, mode_t mode, int flags), (at, file, mode, flags), "chmod", at, file)
CALL(int, truncate, (const char *file, off_t length), (file, length), "truncate", AT_FDCWD, file)
CALL(int, truncate64, (const char *file, off64_t length), (file, length), "truncate", AT_FDCWD, file)
CALL(int, ftruncate, (int at, off_t length), (at, length), "truncate", at, NULL)
CALL(int, ftruncate64, (int at, off64_t length), (at, length), "truncate", at, NULL)
CALL(int, fallocate, (int at, int m, off_t o, off_t n), (at, m, o, n), "allocate", at, NULL)
CALL(int, fallocate64, (int at, int m, off64_t o, off64_t n), (at, m, o, n), "allocate", at, NULL)
CALL(int, fsync, (int at), (at), "fsync", at, NULL)
CALL(int, fdatasync, (int at), (at), "fsync", at, NULL)
CALL(int, msync, (void *a, size_t n, int f), (a, n, f), "msync", -1, NULL)
CALL(int, utimensat, (int at, const char *file, const struct timespec t[2], int f), (at, file, t, f), "utime", at, file)
CALL(int, futimens, (int at, const struct timespec t[2]), (at, t), "utime", at, NULL)
CALL(int, utimes, (const char *file, const struct timeval t[2]), (file, t), "utime", AT_FDCWD, file)
CALL(ssize_t, read, (int at, void *to, size_t n), (at, to, n), "read", at, NULL)
CALL(ssize_t, pread64, (int at, void *to, size_t n, off64_t o), (at, to, n, o), "read", at, NULL)

/* A call that writes: it can be half done. */
#define WRITE(type, function, parameters, arguments, at, less)                                                       \
  ssize_t function parameters {                                                                                      \
    REAL(ssize_t, function);                                                                                         \
    int what = fate("write", at, NULL);                                                                              \
    if (what < 0) return -1;                                                                                         \
    if (what == HALF) { less; }                                                                                      \
    ssize_t result = real arguments;                                                                                 \
    if (kind == HALF) die_if_half(what);                                                                             \
    return result;                                                                                                   \
  }
#define HALVE(n) n = (n) > 1 ? (n) / 2 : (n)
WRITE(ssize_t, write, (int at, const void *from, size_t n), (at, from, n), at, HALVE(n))
WRITE(ssize_t, pwrite, (int at, const void *from, size_t n, off_t o), (at, from, n, o), at, HALVE(n))
WRITE(ssize_t, pwrite64, (int at, const void *from, size_t n, off64_t o), (at, from, n, o), at, HALVE(n))
WRITE(ssize_t, writev, (int at, const struct iovec *from, int n), (at, from, n), at, HALVE(n))
WRITE(ssize_t, pwritev, (int at, const struct iovec *from, int n, off_t o), (at, from, n, o), at, HALVE(n))
WRITE(ssize_t, sendfile, (int at, int from, off_t *o, size_t n), (at, from, o, n), at, HALVE(n))
WRITE(ssize_t, sendfile64, (int at, int from, off64_t *o, size_t n), (at, from, o, n), at, HALVE(n))
WRITE(ssize_t, copy_file_range, (int from, off64_t *a, int at, off64_t *b, size_t n, unsigned f), (from, a, at, b, n, f), at, HALVE(n))

/* Writing through a memory map cannot be stopped half-way, but counts where it begins. */
#define MAP(function, offset)                                                                                        \
  void *function(void *a, size_t n, int protection, int flags, int at, offset o) {                                   \
    REAL(void *, function);                                                                                          \
    int shared = (flags & MAP_SHARED) && (protection & PROT_WRITE) && at >= 0;                                       \
    int what = shared ? fate("map", at, NULL) : 0;                                                                   \
    if (what < 0) return MAP_FAILED;                                                                                 \
    void *result = real(a, n, protection, flags, at, o);                                                             \
    die_if_half(what);                                                                                               \
    return result;                                                                                                   \
  }
MAP(mmap, off_t)
MAP(mmap64, off64_t)
