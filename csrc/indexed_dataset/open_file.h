// A file opened for reading, and the bounded number of them that a process keeps open.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

namespace illada {

class OpenFile {
 public:
  // Where the process has no descriptor left, half of those in OpenFiles are closed first. Throws DiskError; DataError
  // for something that is no regular file.
  explicit OpenFile(const std::string& path);
  ~OpenFile();
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;

  int descriptor() const { return descriptor_; }
  // When it was opened.
  uint64_t size_bytes() const { return size_bytes_; }
  // Throws DiskError.
  uint64_t SizeNow() const;

  // Reads bytes [offset, offset + count) to `to`, from any number of threads and processes at once. Throws DiskError
  // for what the disk or the file server refuses; DataError where the file ends before.
  void Read(uint64_t offset, size_t count, std::byte* to) const;

 private:
  const std::string path_;
  const int descriptor_;
  uint64_t size_bytes_ = 0;
};

// The files that all TokenReaders of the process have open; beyond the limit, the one whose last use is longest ago is
// closed. All methods may be called from several threads at once; a fork meanwhile leaves the child a whole one.
class OpenFiles {
 public:
  // (a reader, one of its files)
  using Key = std::pair<uint64_t, size_t>;

  static OpenFiles& OfProcess();

  // At most so many descriptors are kept: a quarter of what the process may have (RLIMIT_NOFILE), and 1,024.
  static size_t Limit();

  // The file if it is open, else nullptr. It stays open while the caller holds it.
  std::shared_ptr<const OpenFile> Find(Key key);
  // Keeps `file`, which stays the caller's too.
  void Keep(Key key, std::shared_ptr<const OpenFile> file);
  // Keeps those no longer whose last use is longest ago.
  void CloseHalf();
  // Keeps one, or all of a reader, no longer.
  void Drop(Key key);
  void DropAll(uint64_t reader);

 private:
  OpenFiles();

  struct Kept {
    Key key;
    std::shared_ptr<const OpenFile> file;
  };
  // All but the last used `count`; the caller has the lock, and closes them without it.
  std::list<Kept> TakeBeyond(size_t count);

  std::mutex mutex_;
  std::list<Kept> by_use_;  // the last used first
  std::map<Key, std::list<Kept>::iterator> by_key_;
};

}  // namespace illada
