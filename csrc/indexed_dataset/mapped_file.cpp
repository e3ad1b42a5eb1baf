#include "mapped_file.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "errors.h"
#include "open_file.h"

namespace illada {

MappedFile::MappedFile(const std::string& path) {
  const OpenFile file(path);
  const uint64_t size = file.size_bytes();
  if (size == 0) return;
  void* data = mmap(nullptr, size, PROT_READ, MAP_SHARED, file.descriptor(), 0);
  if (data == MAP_FAILED) throw DiskError(errno, path);
  data_ = static_cast<const std::byte*>(data);
  size_bytes_ = size;
  const uint64_t again = file.SizeNow();
  if (again == size) return;
  munmap(data, size);
  throw DataError(path + ": went from " + std::to_string(size) + " to " + std::to_string(again) +
                  " bytes while it was opened, expected a finished file: another process is writing it");
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<std::byte*>(data_), size_bytes_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_bytes_(std::exchange(other.size_bytes_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_bytes_, other.size_bytes_);
  return *this;
}

void MappedFile::Forget(uint64_t begin, uint64_t end) const noexcept {
  // whole pages only: the page that `end` lies in is still needed for what follows
  const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const uint64_t first = begin / page * page;
  const uint64_t last = std::min(end, size_bytes_) / page * page;
  if (first < last) madvise(const_cast<std::byte*>(data_) + first, last - first, MADV_DONTNEED);
}

uint64_t FileBytes(const std::string& path) {
  struct stat status;
  if (stat(path.c_str(), &status) != 0) throw DiskError(errno, path);
  if (!S_ISREG(status.st_mode)) throw DataError(path + ": is no regular file, expected one of a shard");
  return static_cast<uint64_t>(status.st_size);
}

}  // namespace illada
