// Preloaded into a process under test: stands between it and the C library's calls on files below one directory, makes
// a chosen call of a chosen rank fail, be cut short, be slow, hang, kill or stop its process, and keeps a journal.
//
// Why LD_PRELOAD and not FUSE: no privileges and no device, it works in a container, it knows the caller's rank, and
// calls outside of the directory cost nothing but a look at their path. What it cannot see are calls that do not go
// through the C library's symbols: stdio's own reads and writes behind fopen, stores into maps, code that makes system
// calls itself. test_injection.py compares its journal with strace's for what this package does.
//
// Linux with glibc 2.33 or newer, 64 bits: there the names with and without 64 are the same functions.
#define _GNU_SOURCE
#include "interpose.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
// another symbol for a function; declared under a name of its own, as the headers give some of them other types
#define ALIAS(name, target) EXPORT __typeof__(target) Alias_##name __asm__(#name) __attribute__((alias(#target)))

static struct control* control;
static int journal = -1;

// From now on the faults and the journal of `shared`, a directory; also for a process that was forked from another.
EXPORT void AttachFaults(const char* shared) {
  char path[PATH_MAX];
  snprintf(path, sizeof path, "%s/control", shared);
  const int descriptor = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
  if (descriptor < 0) return;
  void* memory =
      (void*)syscall(SYS_mmap, NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  syscall(SYS_close, descriptor);
  snprintf(path, sizeof path, "%s/journal", shared);
  const int low = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  journal = (int)syscall(SYS_fcntl, low, F_DUPFD_CLOEXEC, 512);  // out of the way of the process's own
  syscall(SYS_close, low);
  if (memory != MAP_FAILED) control = memory;
}

__attribute__((constructor)) static void Start(void) {
  const char* shared = getenv("ILLADA_FAULTS");
  if (shared != NULL) AttachFaults(shared);
}

static int Rank(void) {
  const char* rank = getenv("RANK");
  return rank != NULL ? atoi(rank) : -1;
}

// --- which file ---

// Where a descriptor leads, or a directory that a path is relative to. False: to no file.
static int PathOf(int descriptor, char* out) {
  char link[64];
  if (descriptor == AT_FDCWD)
    strcpy(link, "/proc/self/cwd");
  else
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  const long count = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH_MAX - 1);
  if (count <= 0 || out[0] != '/') return 0;
  out[count] = '\0';
  char* deleted = strstr(out, " (deleted)");
  if (deleted != NULL && deleted[10] == '\0') *deleted = '\0';
  return 1;
}

// `path` from the directory `at`, without `.`, `..` and double slashes; symbolic links are not followed.
static int Absolute(int at, const char* path, char* out) {
  size_t end = 0;
  if (path[0] != '/') {
    if (!PathOf(at, out)) return 0;
    end = strcmp(out, "/") == 0 ? 0 : strlen(out);
  }
  while (*path != '\0') {
    const size_t length = strcspn(path, "/");
    if (length == 2 && path[0] == '.' && path[1] == '.') {
      while (end > 0 && out[--end] != '/') continue;
    } else if (length > 0 && !(length == 1 && path[0] == '.')) {
      if (end + length + 2 > PATH_MAX) return 0;
      out[end++] = '/';
      memcpy(out + end, path, length);
      end += length;
    }
    path += length + (path[length] == '/');
  }
  out[end] = '\0';
  return 1;
}

// The part of an absolute path below the directory, "." for itself, NULL outside.
static const char* Below(const char* path) {
  const size_t length = strlen(control->root);
  if (strncmp(path, control->root, length) != 0) return NULL;
  if (path[length] == '\0') return ".";
  return path[length] == '/' ? path + length + 1 : NULL;
}

// --- a call while it is made ---

struct call {
  const char* name;
  const char* path;   // below the directory; NULL: none of ours
  const char* other;  // the second of rename and link
  struct fault* fault;
  int descriptor;
  int error;  // errno behind the real call
  uint32_t flags;
  char paths[2][PATH_MAX];
};

static void Sleep(long milliseconds) {
  struct timespec left = {milliseconds / 1000, milliseconds % 1000 * 1000000};
  while (nanosleep(&left, &left) != 0 && errno == EINTR) continue;
}

static void WaitWhileArmed(struct fault* fault, int32_t as) {
  while (atomic_load(&fault->armed) == as) Sleep(5);
}

static int IsFor(const struct fault* fault, const struct call* call, int rank) {
  if (fault->rank >= 0 && fault->rank != rank) return 0;
  if (fault->calls[0] != '\0') {
    char word[64];
    snprintf(word, sizeof word, " %s ", call->name);
    if (strstr(fault->calls, word) == NULL) return 0;
  }
  return fnmatch(fault->path, call->path, 0) == 0 || (call->other != NULL && fnmatch(fault->path, call->other, 0) == 0);
}

static void Write(const struct call* call, int64_t result, int injected, int64_t offset, const void* data,
                  size_t data_bytes) {
  struct stat status = {0};
  if (call->descriptor >= 0)
    syscall(SYS_newfstatat, call->descriptor, "", &status, AT_EMPTY_PATH);
  else if (result >= 0)
    syscall(SYS_newfstatat, AT_FDCWD, call->paths[call->other != NULL], &status, AT_SYMLINK_NOFOLLOW);
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  struct record record = {.flags = call->flags,
                          .rank = Rank(),
                          .pid = getpid(),
                          .error = call->error,
                          .injected = injected,
                          .result = result,
                          .offset = offset,
                          .time_ns = now.tv_sec * INT64_C(1000000000) + now.tv_nsec,
                          .inode = status.st_ino,
                          .call_bytes = strlen(call->name),
                          .path_bytes = strlen(call->path),
                          .other_bytes = call->other != NULL ? strlen(call->other) : 0,
                          .data_bytes = data_bytes};
  struct iovec parts[] = {{&record, sizeof record},
                          {(void*)call->name, record.call_bytes},
                          {(void*)call->path, record.path_bytes},
                          {(void*)call->other, record.other_bytes},
                          {(void*)data, data_bytes}};
  for (int part = 0; part < 5; ++part) record.size += parts[part].iov_len;
  syscall(SYS_writev, journal, parts, 5);  // one call: records of several processes do not mix
}

// Before the real call. True: it is not to be made, and the caller returns -1 with errno.
static int Intercepted(struct call* call) {
  if (call->path == NULL) return 0;
  const int rank = Rank(), before = errno;
  for (struct fault* fault = control->faults; fault < control->faults + FAULTS; ++fault) {
    const int32_t armed = atomic_load(&fault->armed);
    if (armed == 0) continue;
    const int frozen =
        fault->action == FREEZE && atomic_load(&fault->fired) && (fault->rank < 0 || fault->rank == rank);
    if (!frozen) {
      if (!IsFor(fault, call, rank)) continue;
      const int64_t number = atomic_fetch_add(&fault->seen, 1) + 1;
      if (number < fault->first || number > fault->last) continue;
      atomic_fetch_add(&fault->fired, 1);
    }
    switch (fault->action) {
      case FAIL:
        if (strcmp(call->name, "close") == 0) syscall(SYS_close, call->descriptor);  // it is gone all the same
        call->error = errno = fault->error;
        if (atomic_load(&control->journal)) Write(call, -1, 1, 0, NULL, 0);
        errno = fault->error;
        return 1;
      case DELAY:
        Sleep(fault->argument);
        break;
      case HANG:
      case FREEZE:
        if (atomic_load(&control->journal)) Write(call, -1, 1, 0, NULL, 0);
        WaitWhileArmed(fault, armed);
        fault = control->faults - 1;  // what is armed now may be meant for this very call
        break;
      case KILL:
      case STOP:
        if (atomic_load(&control->journal)) Write(call, -1, 1, 0, NULL, 0);
        raise(fault->action == KILL ? SIGKILL : SIGSTOP);
        break;
      default:
        call->fault = fault;
    }
  }
  errno = before;
  return 0;
}

static size_t Shortened(const struct call* call, size_t count) {
  const int cut = call->fault != NULL && call->fault->action == SHORT && (size_t)call->fault->argument < count;
  return cut ? (size_t)call->fault->argument : count;
}

// Behind the real call, whose result this returns, unless its answer is to be lost.
static long Done(struct call* call, long result, int64_t offset, const void* data, size_t data_bytes) {
  if (call->path == NULL) return result;
  call->error = result < 0 ? errno : 0;
  const int before = errno, lost = call->fault != NULL && call->fault->action == FAIL_AFTER;
  const int mode = atomic_load(&control->journal);
  if (mode) Write(call, result, call->fault != NULL, offset, data, mode > 1 && result > 0 ? data_bytes : 0);
  errno = lost ? call->fault->error : before;
  return lost ? -1 : result;
}

static void Name(struct call* call, const char* name) {
  call->name = name;
  call->path = call->other = NULL;
  call->fault = NULL;
  call->descriptor = -1;
  call->error = 0;
  call->flags = 0;
}

static void OfPath(struct call* call, const char* name, int at, const char* path) {
  Name(call, name);
  if (control != NULL && path != NULL && Absolute(at, path, call->paths[0])) call->path = Below(call->paths[0]);
}

static void OfDescriptor(struct call* call, const char* name, int descriptor) {
  Name(call, name);
  if (control == NULL || descriptor < 0 || !PathOf(descriptor, call->paths[0])) return;
  call->path = Below(call->paths[0]);
  call->descriptor = descriptor;
}

#include "interpose_calls.h"
