#include "open_file.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>

#include "errors.h"

namespace illada {

namespace {

int OpenToRead(const std::string& path) {
  // O_NONBLOCK means nothing to a file; a pipe of a shard's name would be waited for until somebody writes to it
  const auto attempt = [&path] {
    return Uninterrupted([&path] { return open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); });
  };
  int descriptor = attempt();
  if (descriptor < 0 && (errno == EMFILE || errno == ENFILE)) {
    OpenFiles::OfProcess().CloseHalf();
    descriptor = attempt();
  }
  if (descriptor < 0) throw DiskError(errno, path);
  return descriptor;
}

}  // namespace

OpenFile::OpenFile(const std::string& path) : path_(path), descriptor_(OpenToRead(path)) {
  try {
    size_bytes_ = SizeNow();
  } catch (...) {
    close(descriptor_);
    throw;
  }
}

OpenFile::~OpenFile() { close(descriptor_); }

uint64_t OpenFile::SizeNow() const {
  struct stat status;
  if (fstat(descriptor_, &status) != 0) throw DiskError(errno, path_);
  if (!S_ISREG(status.st_mode)) throw DataError(path_ + ": is no regular file, expected one of a shard");
  return static_cast<uint64_t>(status.st_size);
}

void OpenFile::Read(uint64_t offset, size_t count, std::byte* to) const {
  while (count > 0) {
    const ssize_t read = pread(descriptor_, to, count, static_cast<off_t>(offset));
    if (read < 0 && errno == EINTR) continue;
    if (read < 0) throw DiskError(errno, path_);
    if (read == 0)
      throw DataError(path_ + ": ends at byte " + std::to_string(SizeNow()) + ", expected " +
                      std::to_string(size_bytes_) + " bytes as when it was opened: it was truncated: " + kRewrite);
    offset += static_cast<uint64_t>(read);
    to += read;
    count -= static_cast<size_t>(read);
  }
}

OpenFiles::OpenFiles() {
  // a child that is forked while another thread holds the lock would wait for it forever
  pthread_atfork([] { OfProcess().mutex_.lock(); }, [] { OfProcess().mutex_.unlock(); },
                 [] { OfProcess().mutex_.unlock(); });
}

OpenFiles& OpenFiles::OfProcess() {
  // never destroyed: readers may outlive it when the process ends
  static OpenFiles* const files = new OpenFiles;
  return *files;
}

size_t OpenFiles::Limit() {
  constexpr rlim_t kMost = 1024;
  struct rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return 1;
  return static_cast<size_t>(std::clamp(limit.rlim_cur / 4, rlim_t{1}, kMost));
}

std::shared_ptr<const OpenFile> OpenFiles::Find(Key key) {
  const std::lock_guard lock(mutex_);
  const auto found = by_key_.find(key);
  if (found == by_key_.end()) return nullptr;
  by_use_.splice(by_use_.begin(), by_use_, found->second);
  return found->second->file;
}

void OpenFiles::Keep(Key key, std::shared_ptr<const OpenFile> file) {
  const size_t limit = Limit();
  std::list<Kept> closed;  // after the lock: closing may wait for a file server
  const std::lock_guard lock(mutex_);
  if (by_key_.count(key) != 0) return;  // another thread was first
  by_use_.push_front({key, std::move(file)});
  by_key_[key] = by_use_.begin();
  closed = TakeBeyond(limit);
}

void OpenFiles::CloseHalf() {
  std::list<Kept> closed;
  const std::lock_guard lock(mutex_);
  closed = TakeBeyond(by_use_.size() / 2);
}

std::list<OpenFiles::Kept> OpenFiles::TakeBeyond(size_t count) {
  std::list<Kept> taken;
  while (by_use_.size() > count) {
    by_key_.erase(by_use_.back().key);
    taken.splice(taken.end(), by_use_, std::prev(by_use_.end()));
  }
  return taken;
}

void OpenFiles::Drop(Key key) {
  std::list<Kept> closed;
  const std::lock_guard lock(mutex_);
  if (const auto found = by_key_.find(key); found != by_key_.end()) {
    closed.splice(closed.end(), by_use_, found->second);
    by_key_.erase(found);
  }
}

void OpenFiles::DropAll(uint64_t reader) {
  std::list<Kept> closed;
  const std::lock_guard lock(mutex_);
  const auto begin = by_key_.lower_bound({reader, 0});
  const auto end = by_key_.upper_bound({reader, std::numeric_limits<size_t>::max()});
  for (auto each = begin; each != end; ++each) closed.splice(closed.end(), by_use_, each->second);
  by_key_.erase(begin, end);
}

}  // namespace illada
