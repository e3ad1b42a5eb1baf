// A file that is being written under a temporary name, and the step that makes it a shard.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace illada {

// `path`.tmp: the name of a file until it is complete.
std::string TemporaryName(const std::string& path);

// A file descriptor that writes whole blocks and closes itself.
class OutputFile {
 public:
  OutputFile() = default;
  ~OutputFile() { Close(); }
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  // Creates or empties `path`. Takes an advisory lock, so that two writers of the same shard never interleave: the
  // second one gets a DiskError (EWOULDBLOCK). What a killed writer left behind is overwritten.
  void Open(const std::string& path);
  void Append(const void* bytes, size_t count);
  // Appends the `size_bytes` bytes of another file, inside the kernel where it can: then they never pass through this
  // process. `progress` is called with the number of bytes done since its last call, and may throw.
  void AppendFile(const std::string& path, uint64_t size_bytes, const std::function<void(uint64_t)>& progress);
  // Flushes to the device.
  void Sync();
  void Close() noexcept;

 private:
  void StartWriting(uint64_t count) const;
  void Write(const char* from, size_t count);
  void Flush();

  std::string path_;
  std::vector<char> buffer_;
  int descriptor_ = -1;
};

// Gives PREFIX.bin.tmp and PREFIX.idx.tmp, both flushed to the device, their names: .bin first, .idx last, so that an
// .idx always stands beside its complete .bin, also after a power failure. Replaces a shard of the same name.
void PublishShard(const std::string& prefix);

}  // namespace illada
