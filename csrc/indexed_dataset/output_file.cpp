#include "output_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "errors.h"
#include "open_file.h"

namespace illada {
namespace {

// Large writes: a parallel file system serves megabytes at a time far better than pages.
constexpr size_t kBufferBytes = size_t{8} << 20;
// Long enough to be fast, short enough to show progress and to heed an interrupt.
constexpr uint64_t kCopiedAtATime = uint64_t{16} << 20;

[[noreturn]] void ThrowDiskError(const std::string& path) { throw DiskError(errno, path); }

}  // namespace

void OutputFile::Create(const std::string& path) {
  descriptor_ = Uninterrupted([&] { return open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666); });
  if (descriptor_ < 0) ThrowDiskError(path);
  path_ = path;
  buffer_.reserve(kBufferBytes);
}

void OutputFile::Append(const void* bytes, size_t count) {
  const char* from = static_cast<const char*>(bytes);
  while (count > 0) {
    const size_t fits = std::min(count, kBufferBytes - buffer_.size());
    buffer_.insert(buffer_.end(), from, from + fits);
    from += fits;
    count -= fits;
    if (buffer_.size() == kBufferBytes) Flush();
  }
}

void OutputFile::AppendFile(const std::string& path, uint64_t size_bytes,
                            const std::function<void(uint64_t)>& progress) {
  Flush();
  const OpenFile input(path);
  bool in_kernel = true;
  for (uint64_t left = size_bytes; left > 0;) {
    if (in_kernel) {
      const ssize_t copied =
          copy_file_range(input.descriptor(), nullptr, descriptor_, nullptr, std::min(left, kCopiedAtATime), 0);
      if (copied > 0) {
        size_bytes_ += static_cast<uint64_t>(copied);
        StartWriting(static_cast<uint64_t>(copied));
        left -= static_cast<uint64_t>(copied);
        progress(static_cast<uint64_t>(copied));
      } else if (copied == 0 || errno != EINTR) {
        // other file systems, old kernels, kinds of files that cannot: whatever it is, reading and writing either work
        // or say what is wrong and with which of the two files
        in_kernel = false;
      }
      continue;
    }
    buffer_.resize(std::min<uint64_t>(left, kBufferBytes));
    const ssize_t count = read(input.descriptor(), buffer_.data(), buffer_.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) ThrowDiskError(path);
    if (count == 0)
      throw DataError(path + ": ends at byte " + std::to_string(size_bytes - left) + ", expected " +
                      std::to_string(size_bytes) + " bytes: it was truncated meanwhile");
    Write(buffer_.data(), static_cast<size_t>(count));
    StartWriting(static_cast<uint64_t>(count));
    left -= static_cast<uint64_t>(count);
    progress(static_cast<uint64_t>(count));
  }
  buffer_.clear();
}

// Lets the device begin with the last `count` bytes while the next are copied; Sync() has to wait for them anyway. Only
// a hint: what a file system makes of it does not matter.
void OutputFile::StartWriting(uint64_t count) const {
  if (count == 0) return;  // to the kernel it would mean: to the end of the file
  const off_t position = lseek(descriptor_, 0, SEEK_CUR);
  if (position >= 0)
    sync_file_range(descriptor_, position - static_cast<off_t>(count), static_cast<off_t>(count),
                    SYNC_FILE_RANGE_WRITE);
}

void OutputFile::Write(const char* from, size_t count) {
  while (count > 0) {
    const ssize_t written = write(descriptor_, from, count);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) ThrowDiskError(path_);
    from += written;
    count -= static_cast<size_t>(written);
    size_bytes_ += static_cast<uint64_t>(written);
  }
}

void OutputFile::Flush() {
  Write(buffer_.data(), buffer_.size());
  StartWriting(buffer_.size());
  buffer_.clear();
}

void OutputFile::Sync() {
  Flush();
  if (Uninterrupted([&] { return fsync(descriptor_); }) != 0) ThrowDiskError(path_);
  struct stat status;
  if (fstat(descriptor_, &status) != 0) ThrowDiskError(path_);
  if (static_cast<uint64_t>(status.st_size) != size_bytes_)
    throw DataError(path_ + ": has " + std::to_string(status.st_size) + " bytes on the disk, expected the " +
                    std::to_string(size_bytes_) + " that were written: the file system lost some, or another process " +
                    "has changed the file; write it again");
}

void OutputFile::Remove() noexcept {
  if (path_.empty()) return;
  Close();
  unlink(path_.c_str());
  path_.clear();
}

void OutputFile::Close() noexcept {
  if (descriptor_ >= 0) close(descriptor_);
  descriptor_ = -1;
  buffer_ = {};
}

}  // namespace illada
