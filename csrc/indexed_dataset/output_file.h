// A file that is being written under a name of its own, until whoever asked for it gives it another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace illada {

// A file descriptor that writes whole blocks and closes itself.
class OutputFile {
 public:
  OutputFile() = default;
  ~OutputFile() { Close(); }
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  // Creates `path`, which must not be there (DiskError, EEXIST): two writers never share a file, whether the file
  // system has locks or not.
  void Create(const std::string& path);
  void Append(const void* bytes, size_t count);
  // Appends the `size_bytes` bytes of another file, inside the kernel where it can: then they never pass through this
  // process. `progress` is called with the number of bytes done since its last call, and may throw.
  void AppendFile(const std::string& path, uint64_t size_bytes, const std::function<void(uint64_t)>& progress);
  // Flushes to the device, and throws DataError unless the file is then as long as what was written.
  void Sync();
  void Close() noexcept;
  // Closes and unlinks what Create() has made, if it has.
  void Remove() noexcept;

 private:
  void StartWriting(uint64_t count) const;
  void Write(const char* from, size_t count);
  void Flush();

  std::string path_;
  std::vector<char> buffer_;
  uint64_t size_bytes_ = 0;
  int descriptor_ = -1;
};

}  // namespace illada
