// Windows of the token stream that shards form one after another.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "open_file.h"
#include "token_type.h"

namespace illada {

struct ShardTokens {
  std::string bin_path;
  TokenType token_type;
  int64_t num_tokens;
};

// Opens nothing when it is made: a hundred thousand shards cost their names. All methods may be called from several
// threads at once.
//
// A corpus that fits what the process may map is mapped, a shard when a window first touches it. A larger one is read
// by pread, with a bounded number of files open: its windows seldom meet a page that is in the page table already, so a
// map would cost more (docs/log.md), and its page tables would grow with every window, to 0.2% of the corpus. Whatever
// cannot be read through a map (SIGBUS) is read by pread too, which says why.
class TokenReader {
 public:
  // What all readers of a process map together.
  static constexpr int64_t kMostMaps = 1024;
  static constexpr int64_t kMostMappedBytes = int64_t{16} << 30;

  // Throws DataError for no shards, for a shard without tokens, and for 2^63 tokens or more.
  explicit TokenReader(std::vector<ShardTokens> shards);
  ~TokenReader();
  TokenReader(const TokenReader&) = delete;
  TokenReader& operator=(const TokenReader&) = delete;

  int64_t num_tokens() const { return starts_.back(); }
  int64_t num_shards() const { return static_cast<int64_t>(shards_.size()); }
  // Whether it is mapped.
  bool mapped() const { return maps_ != nullptr; }

  // out[r, i] = token starts[r] + i of the stream, for r in [0, rows), i in [0, length); Out is uint16_t, int32_t or
  // int64_t. Throws std::out_of_range for a window that is not in the stream; DataError for an id outside [0,
  // vocab_size), for a .bin that is missing, of another size or truncated while it was read, and for a vocab_size whose
  // ids do not fit in Out; DiskError for what the disk refuses. After an exception the contents of `out` are undefined.
  template <typename Out>
  void Read(const int64_t* starts, int64_t rows, int64_t length, int64_t vocab_size, Out* out);

 private:
  std::shared_ptr<const OpenFile> Open(size_t shard) const;
  const std::byte* Map(size_t shard);
  template <typename Out>
  bool ReadMap(size_t shard, int64_t offset, int64_t count, int64_t vocab_size, Out* out);
  template <typename Out>
  void ReadFile(size_t shard, int64_t offset, int64_t count, int64_t vocab_size, Out* out);

  const uint64_t number_;  // no other reader of the process has it
  const std::vector<ShardTokens> shards_;
  std::vector<int64_t> starts_;  // [shards + 1]: where each shard begins in the stream, then the total
  int64_t bytes_ = 0;
  std::unique_ptr<std::atomic<const std::byte*>[]> maps_;  // [shards]: nullptr until the first touch
};

}  // namespace illada
