// Windows of the token stream that shards form one after another.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "token_type.h"

namespace illada {

struct ShardTokens {
  std::string bin_path;
  TokenType token_type;
  int64_t num_tokens;
};

// Opens nothing when it is made: fifty thousand shards cost their names. A shard is mapped when a window first touches
// it, and stays mapped (an entry of vm.max_map_count each). All methods may be called from several threads at once.
class TokenReader {
 public:
  // Throws DataError for no shards, for a shard without tokens, and for 2^63 tokens or more.
  explicit TokenReader(std::vector<ShardTokens> shards);
  ~TokenReader();
  TokenReader(const TokenReader&) = delete;
  TokenReader& operator=(const TokenReader&) = delete;

  int64_t num_tokens() const { return starts_.back(); }
  int64_t num_shards() const { return static_cast<int64_t>(shards_.size()); }

  // out[r, i] = token starts[r] + i of the stream, for r in [0, rows), i in [0, length); Out is uint16_t, int32_t or
  // int64_t. Throws std::out_of_range for a window that is not in the stream; DataError for an id outside [0,
  // vocab_size), for a .bin that is missing or of another size, and for a vocab_size whose ids do not fit in Out;
  // DiskError for what the disk refuses. After an exception the contents of `out` are undefined.
  template <typename Out>
  void Read(const int64_t* starts, int64_t rows, int64_t length, int64_t vocab_size, Out* out);

 private:
  const std::byte* Map(size_t shard);

  const std::vector<ShardTokens> shards_;
  std::vector<int64_t> starts_;  // [shards + 1]: where each shard begins in the stream, then the total
  std::unique_ptr<std::atomic<const std::byte*>[]> maps_;  // [shards]: nullptr until the first touch
};

}  // namespace illada
