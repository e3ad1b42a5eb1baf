// The C library's functions, each with its other names. Included at the end of interpose.c.
#pragma once

// A function whose real call is one system call without anything to add.
#define PLAIN(call, ...)                    \
  if (Intercepted(&call)) return -1;        \
  const long result = syscall(__VA_ARGS__); \
  return (int)Done(&call, result, 0, NULL, 0)

// --- opening and closing ---

static int OpenAt(int at, const char* path, int flags, mode_t mode) {
  struct call call;
  OfPath(&call, "open", at, path);
  if (Intercepted(&call)) return -1;
  struct stat before;
  const int missing =
      call.path != NULL && (flags & O_CREAT) && syscall(SYS_newfstatat, at, path, &before, AT_SYMLINK_NOFOLLOW) != 0;
  const long result = syscall(SYS_openat, at, path, flags, mode);
  call.descriptor = (int)result;
  if (result >= 0) call.flags = (missing ? CREATED : 0) | (flags & O_TRUNC ? TRUNCATED : 0);
  return (int)Done(&call, result, 0, NULL, 0);
}

static mode_t ModeOf(int flags, va_list arguments) {
  return flags & (O_CREAT | __O_TMPFILE) ? va_arg(arguments, mode_t) : 0;
}

EXPORT int open(const char* path, int flags, ...) {
  va_list arguments;
  va_start(arguments, flags);
  const mode_t mode = ModeOf(flags, arguments);
  va_end(arguments);
  return OpenAt(AT_FDCWD, path, flags, mode);
}
ALIAS(open64, open);

EXPORT int openat(int at, const char* path, int flags, ...) {
  va_list arguments;
  va_start(arguments, flags);
  const mode_t mode = ModeOf(flags, arguments);
  va_end(arguments);
  return OpenAt(at, path, flags, mode);
}
ALIAS(openat64, openat);

// what a fortified program calls where no mode is given
EXPORT int __open_2(const char* path, int flags) { return OpenAt(AT_FDCWD, path, flags, 0); }
ALIAS(__open64_2, __open_2);
EXPORT int __openat_2(int at, const char* path, int flags) { return OpenAt(at, path, flags, 0); }
ALIAS(__openat64_2, __openat_2);

EXPORT int creat(const char* path, mode_t mode) { return OpenAt(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
ALIAS(creat64, creat);

EXPORT FILE* fopen(const char* path, const char* mode) {
  struct call call;
  OfPath(&call, "open", AT_FDCWD, path);
  if (Intercepted(&call)) return NULL;
  struct stat before;
  const int missing = call.path != NULL && syscall(SYS_newfstatat, AT_FDCWD, path, &before, AT_SYMLINK_NOFOLLOW) != 0;
  FILE* (*real)(const char*, const char*) = (FILE * (*)(const char*, const char*)) dlsym(RTLD_NEXT, "fopen");
  FILE* file = real(path, mode);
  if (file != NULL) call.flags = (missing ? CREATED : 0) | (mode[0] == 'w' ? TRUNCATED : 0);
  Done(&call, file != NULL ? 0 : -1, 0, NULL, 0);
  return file;
}
ALIAS(fopen64, fopen);

EXPORT int close(int descriptor) {
  struct call call;
  OfDescriptor(&call, "close", descriptor);
  if (Intercepted(&call)) return -1;
  const long result = syscall(SYS_close, descriptor);
  call.descriptor = -1;
  return (int)Done(&call, result, 0, NULL, 0);
}

EXPORT DIR* opendir(const char* path) {
  struct call call;
  OfPath(&call, "opendir", AT_FDCWD, path);
  if (Intercepted(&call)) return NULL;
  DIR* (*real)(const char*) = (DIR * (*)(const char*)) dlsym(RTLD_NEXT, "opendir");
  DIR* directory = real(path);
  Done(&call, directory != NULL ? 0 : -1, 0, NULL, 0);
  return directory;
}

EXPORT struct dirent* readdir(DIR* directory) {
  struct call call;
  OfDescriptor(&call, "readdir", dirfd(directory));
  if (Intercepted(&call)) return NULL;
  struct dirent* (*real)(DIR*) = (struct dirent * (*)(DIR*)) dlsym(RTLD_NEXT, "readdir");
  struct dirent* entry = real(directory);
  Done(&call, entry != NULL ? 1 : 0, 0, NULL, 0);
  return entry;
}
ALIAS(readdir64, readdir);

// --- reading ---

EXPORT ssize_t read(int descriptor, void* to, size_t count) {
  struct call call;
  OfDescriptor(&call, "read", descriptor);
  if (Intercepted(&call)) return -1;
  return Done(&call, syscall(SYS_read, descriptor, to, Shortened(&call, count)), 0, NULL, 0);
}

EXPORT ssize_t pread(int descriptor, void* to, size_t count, off_t offset) {
  struct call call;
  OfDescriptor(&call, "pread", descriptor);
  if (Intercepted(&call)) return -1;
  return Done(&call, syscall(SYS_pread64, descriptor, to, Shortened(&call, count), offset), offset, NULL, 0);
}
ALIAS(pread64, pread);

EXPORT ssize_t __read_chk(int descriptor, void* to, size_t count, size_t size) {
  return read(descriptor, to, count < size ? count : size);
}
EXPORT ssize_t __pread_chk(int descriptor, void* to, size_t count, off_t offset, size_t size) {
  return pread(descriptor, to, count < size ? count : size, offset);
}
ALIAS(__pread64_chk, __pread_chk);

// The first of `parts`, cut to what a short call may move; the others are left for the next call.
static int Cut(const struct call* call, const struct iovec* parts, int count, struct iovec* first) {
  if (call->fault == NULL || call->fault->action != SHORT || count == 0) return 0;
  *first = (struct iovec){parts->iov_base, Shortened(call, parts->iov_len)};
  return 1;
}

#define VECTORED(name, label, type, ...)            \
  struct call call;                                 \
  OfDescriptor(&call, label, descriptor);           \
  if (Intercepted(&call)) return -1;                \
  struct iovec first;                               \
  const int cut = Cut(&call, parts, count, &first); \
  const long result = syscall(name, descriptor, cut ? &first : parts, cut ? 1 : count __VA_ARGS__)

EXPORT ssize_t readv(int descriptor, const struct iovec* parts, int count) {
  VECTORED(SYS_readv, "read", );
  return Done(&call, result, 0, NULL, 0);
}

EXPORT ssize_t preadv(int descriptor, const struct iovec* parts, int count, off_t offset) {
  VECTORED(SYS_preadv, "pread", , , offset, 0L);
  return Done(&call, result, offset, NULL, 0);
}
ALIAS(preadv64, preadv);

EXPORT ssize_t preadv2(int descriptor, const struct iovec* parts, int count, off_t offset, int flags) {
  VECTORED(SYS_preadv2, "pread", , , offset, 0L, flags);
  return Done(&call, result, offset, NULL, 0);
}
ALIAS(preadv64v2, preadv2);

EXPORT void* mmap(void* address, size_t length, int protection, int flags, int descriptor, off_t offset) {
  struct call call;
  OfDescriptor(&call, "mmap", flags & MAP_ANONYMOUS ? -1 : descriptor);
  if (Intercepted(&call)) return MAP_FAILED;
  return (void*)Done(&call, syscall(SYS_mmap, address, length, protection, flags, descriptor, offset), offset, NULL, 0);
}
ALIAS(mmap64, mmap);

// --- writing ---

// Where a write through the descriptor's own position began.
static int64_t Began(const struct call* call, int descriptor, long written) {
  return call->path != NULL && written > 0 ? syscall(SYS_lseek, descriptor, 0, SEEK_CUR) - written : 0;
}

EXPORT ssize_t write(int descriptor, const void* from, size_t count) {
  struct call call;
  OfDescriptor(&call, "write", descriptor);
  if (Intercepted(&call)) return -1;
  const long result = syscall(SYS_write, descriptor, from, Shortened(&call, count));
  const int before = errno;
  const int64_t offset = Began(&call, descriptor, result);
  errno = before;
  return Done(&call, result, offset, from, result > 0 ? (size_t)result : 0);
}

EXPORT ssize_t pwrite(int descriptor, const void* from, size_t count, off_t offset) {
  struct call call;
  OfDescriptor(&call, "write", descriptor);
  if (Intercepted(&call)) return -1;
  const long result = syscall(SYS_pwrite64, descriptor, from, Shortened(&call, count), offset);
  return Done(&call, result, offset, from, result > 0 ? (size_t)result : 0);
}
ALIAS(pwrite64, pwrite);

// Part by part, so that the journal has what each wrote: fewer bytes than asked for are a write's right.
EXPORT ssize_t writev(int descriptor, const struct iovec* parts, int count) {
  if (control == NULL) return syscall(SYS_writev, descriptor, parts, count);
  struct call call;
  OfDescriptor(&call, "write", descriptor);
  if (call.path == NULL) return syscall(SYS_writev, descriptor, parts, count);
  return count > 0 ? write(descriptor, parts->iov_base, parts->iov_len) : 0;
}

EXPORT ssize_t pwritev(int descriptor, const struct iovec* parts, int count, off_t offset) {
  if (control == NULL) return syscall(SYS_pwritev, descriptor, parts, count, offset, 0L);
  struct call call;
  OfDescriptor(&call, "write", descriptor);
  if (call.path == NULL) return syscall(SYS_pwritev, descriptor, parts, count, offset, 0L);
  return count > 0 ? pwrite(descriptor, parts->iov_base, parts->iov_len, offset) : 0;
}
ALIAS(pwritev64, pwritev);

EXPORT ssize_t copy_file_range(int in, off_t* in_offset, int out, off_t* out_offset, size_t count, unsigned flags) {
  struct call call;
  OfDescriptor(&call, "copy_file_range", out);
  if (Intercepted(&call)) return -1;
  const long result = syscall(SYS_copy_file_range, in, in_offset, out, out_offset, Shortened(&call, count), flags);
  if (call.path == NULL || result <= 0 || atomic_load(&control->journal) < 2) return Done(&call, result, 0, NULL, 0);
  const int64_t read_at = (in_offset != NULL ? *in_offset : syscall(SYS_lseek, in, 0, SEEK_CUR)) - result;
  const int64_t offset = out_offset != NULL ? *out_offset - result : Began(&call, out, result);
  void* copied = malloc((size_t)result);
  const long read_back = syscall(SYS_pread64, in, copied, result, read_at);
  Done(&call, result, offset, copied, read_back == result ? (size_t)result : 0);
  free(copied);
  return result;
}

EXPORT int ftruncate(int descriptor, off_t length) {
  struct call call;
  OfDescriptor(&call, "truncate", descriptor);
  if (Intercepted(&call)) return -1;
  return (int)Done(&call, syscall(SYS_ftruncate, descriptor, length), length, NULL, 0);
}
ALIAS(ftruncate64, ftruncate);

EXPORT int truncate(const char* path, off_t length) {
  struct call call;
  OfPath(&call, "truncate", AT_FDCWD, path);
  if (Intercepted(&call)) return -1;
  return (int)Done(&call, syscall(SYS_truncate, path, length), length, NULL, 0);
}
ALIAS(truncate64, truncate);

EXPORT int fallocate(int descriptor, int mode, off_t offset, off_t length) {
  struct call call;
  OfDescriptor(&call, "fallocate", descriptor);
  if (Intercepted(&call)) return -1;
  const long result = syscall(SYS_fallocate, descriptor, mode, offset, length);
  return (int)Done(&call, result, mode & FALLOC_FL_KEEP_SIZE ? 0 : offset + length, NULL, 0);
}
ALIAS(fallocate64, fallocate);

EXPORT int posix_fallocate(int descriptor, off_t offset, off_t length) {
  return fallocate(descriptor, 0, offset, length) == 0 ? 0 : errno;
}
ALIAS(posix_fallocate64, posix_fallocate);

// --- making durable, locking ---

EXPORT int fsync(int descriptor) {
  struct call call;
  OfDescriptor(&call, "fsync", descriptor);
  PLAIN(call, SYS_fsync, descriptor);
}

EXPORT int fdatasync(int descriptor) {
  struct call call;
  OfDescriptor(&call, "fsync", descriptor);
  PLAIN(call, SYS_fdatasync, descriptor);
}

EXPORT int flock(int descriptor, int operation) {
  struct call call;
  OfDescriptor(&call, "flock", descriptor);
  PLAIN(call, SYS_flock, descriptor, operation);
}

EXPORT int fcntl(int descriptor, int command, ...) {
  va_list arguments;
  va_start(arguments, command);
  const long argument = va_arg(arguments, long);
  va_end(arguments);
  const int locks = command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW;
  struct call call;
  OfDescriptor(&call, "flock", locks ? descriptor : -1);
  PLAIN(call, SYS_fcntl, descriptor, command, argument);
}
ALIAS(fcntl64, fcntl);

// --- names ---

static int Rename(int from_at, const char* from, int to_at, const char* to, unsigned flags) {
  struct call call;
  OfPath(&call, "rename", from_at, from);
  if (control != NULL && Absolute(to_at, to, call.paths[1])) call.other = Below(call.paths[1]);
  if (call.path == NULL || call.other == NULL) call.path = call.other = NULL;  // into or out of the directory
  PLAIN(call, SYS_renameat2, from_at, from, to_at, to, flags);
}

EXPORT int rename(const char* from, const char* to) { return Rename(AT_FDCWD, from, AT_FDCWD, to, 0); }
EXPORT int renameat(int from_at, const char* from, int to_at, const char* to) {
  return Rename(from_at, from, to_at, to, 0);
}
EXPORT int renameat2(int from_at, const char* from, int to_at, const char* to, unsigned flags) {
  return Rename(from_at, from, to_at, to, flags);
}

EXPORT int linkat(int from_at, const char* from, int to_at, const char* to, int flags) {
  struct call call;
  OfPath(&call, "link", from_at, from);
  if (control != NULL && Absolute(to_at, to, call.paths[1])) call.other = Below(call.paths[1]);
  if (call.path == NULL || call.other == NULL) call.path = call.other = NULL;
  PLAIN(call, SYS_linkat, from_at, from, to_at, to, flags);
}
EXPORT int link(const char* from, const char* to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

EXPORT int symlinkat(const char* target, int at, const char* path) {
  struct call call;
  OfPath(&call, "symlink", at, path);
  PLAIN(call, SYS_symlinkat, target, at, path);
}
EXPORT int symlink(const char* target, const char* path) { return symlinkat(target, AT_FDCWD, path); }

static int Remove(const char* name, int at, const char* path, int flags) {
  struct call call;
  OfPath(&call, name, at, path);
  PLAIN(call, SYS_unlinkat, at, path, flags);
}

EXPORT int unlink(const char* path) { return Remove("unlink", AT_FDCWD, path, 0); }
EXPORT int rmdir(const char* path) { return Remove("rmdir", AT_FDCWD, path, AT_REMOVEDIR); }
EXPORT int unlinkat(int at, const char* path, int flags) {
  return Remove(flags & AT_REMOVEDIR ? "rmdir" : "unlink", at, path, flags);
}

EXPORT int mkdirat(int at, const char* path, mode_t mode) {
  struct call call;
  OfPath(&call, "mkdir", at, path);
  PLAIN(call, SYS_mkdirat, at, path, mode);
}
EXPORT int mkdir(const char* path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

// --- asking ---

EXPORT int fstatat(int at, const char* path, struct stat* status, int flags) {
  struct call call;
  if (path[0] == '\0')
    OfDescriptor(&call, "stat", at);
  else
    OfPath(&call, "stat", at, path);
  PLAIN(call, SYS_newfstatat, at, path, status, flags);
}
ALIAS(fstatat64, fstatat);

EXPORT int stat(const char* path, struct stat* status) { return fstatat(AT_FDCWD, path, status, 0); }
ALIAS(stat64, stat);
EXPORT int lstat(const char* path, struct stat* status) { return fstatat(AT_FDCWD, path, status, AT_SYMLINK_NOFOLLOW); }
ALIAS(lstat64, lstat);
EXPORT int fstat(int descriptor, struct stat* status) { return fstatat(descriptor, "", status, AT_EMPTY_PATH); }
ALIAS(fstat64, fstat);

EXPORT int statx(int at, const char* path, int flags, unsigned mask, struct statx* status) {
  struct call call;
  if (path[0] == '\0')
    OfDescriptor(&call, "stat", at);
  else
    OfPath(&call, "stat", at, path);
  PLAIN(call, SYS_statx, at, path, flags, mask, status);
}

EXPORT int faccessat(int at, const char* path, int mode, int flags) {
  struct call call;
  OfPath(&call, "access", at, path);
  PLAIN(call, SYS_faccessat, at, path, mode, flags);
}
EXPORT int access(const char* path, int mode) { return faccessat(AT_FDCWD, path, mode, 0); }

EXPORT int fchmod(int descriptor, mode_t mode) {
  struct call call;
  OfDescriptor(&call, "chmod", descriptor);
  PLAIN(call, SYS_fchmod, descriptor, mode);
}
EXPORT int chmod(const char* path, mode_t mode) {
  struct call call;
  OfPath(&call, "chmod", AT_FDCWD, path);
  PLAIN(call, SYS_fchmodat, AT_FDCWD, path, mode, 0);
}
EXPORT int utimensat(int at, const char* path, const struct timespec times[2], int flags) {
  struct call call;
  OfPath(&call, "utime", at, path);
  PLAIN(call, SYS_utimensat, at, path, times, flags);
}
EXPORT int futimens(int descriptor, const struct timespec times[2]) {
  struct call call;
  OfDescriptor(&call, "utime", descriptor);
  PLAIN(call, SYS_utimensat, descriptor, NULL, times, 0);
}
