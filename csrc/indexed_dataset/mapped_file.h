// A file mapped into memory, read-only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace illada {

// The descriptor is closed once the map stands: thousands of maps need no open files, but each counts against
// vm.max_map_count (65,530 by default).
//
// The size is asked for again after mapping, so a file that shrinks while it is opened is refused. One that shrinks
// later (shards are replaced by renaming, which leaves an open map whole, so somebody must have truncated it in place)
// ends the process with SIGBUS at the next touch of a page that is gone; nothing short of read() could prevent that.
class MappedFile {
 public:
  MappedFile() = default;
  // Throws DiskError; DataError for a file that changes its size meanwhile.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  // Page-aligned; nullptr for an empty file.
  const std::byte* data() const { return data_; }
  uint64_t size_bytes() const { return size_bytes_; }

  // Lets go of the pages in [begin, end): they stay in the page cache but no longer count as this process's memory.
  // A later touch maps them again. For passes over more bytes than there is memory.
  void Forget(uint64_t begin, uint64_t end) const noexcept;

 private:
  const std::byte* data_ = nullptr;
  uint64_t size_bytes_ = 0;
};

// Size of the regular file `path`. Throws DiskError; DataError for something that is no file.
uint64_t FileBytes(const std::string& path);

}  // namespace illada
