#include "token_reader.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <stdexcept>
#include <utility>

#include "errors.h"
#include "mapped_file.h"
#include "token_copy.h"

namespace illada {

TokenReader::TokenReader(std::vector<ShardTokens> shards)
    : shards_(std::move(shards)), maps_(std::make_unique<std::atomic<const std::byte*>[]>(shards_.size())) {
  if (shards_.empty()) throw DataError("no shards were given, expected at least one");
  // bytes have to be countable too, and a token has up to 8
  constexpr int64_t kMostTokens = std::numeric_limits<int64_t>::max() / 8;
  starts_.reserve(shards_.size() + 1);
  starts_.push_back(0);
  for (size_t i = 0; i < shards_.size(); ++i) {
    maps_[i].store(nullptr, std::memory_order_relaxed);
    if (shards_[i].num_tokens < 1 || shards_[i].num_tokens > kMostTokens - starts_.back())
      throw DataError(shards_[i].bin_path + ": holds " + std::to_string(shards_[i].num_tokens) +
                      " tokens, expected 1 or more, and at most " + std::to_string(kMostTokens) + " in all shards");
    starts_.push_back(starts_.back() + shards_[i].num_tokens);
  }
}

TokenReader::~TokenReader() {
  for (size_t i = 0; i < shards_.size(); ++i) {
    const std::byte* map = maps_[i].load();
    if (map != nullptr)
      munmap(const_cast<std::byte*>(map),
             static_cast<size_t>(shards_[i].num_tokens * TokenBytes(shards_[i].token_type)));
  }
}

// First byte of shard `shard`. Threads that come first together each map the file; one of the maps is kept.
const std::byte* TokenReader::Map(size_t shard) {
  const std::byte* map = maps_[shard].load(std::memory_order_acquire);
  if (map != nullptr) return map;
  const auto& [path, type, num_tokens] = shards_[shard];
  MappedFile file;
  try {
    file = MappedFile(path);
  } catch (const DiskError& error) {
    if (error.code().value() == ENOMEM)
      throw DataError(path +
                      ": cannot be mapped beside the shards that are: raise the system's vm.max_map_count, or "
                      "merge shards (tools/merge_datasets.py)");
    if (error.code().value() != ENOENT) throw;
    throw DataError(path + ": no such file; the corpus lists it as a shard: correct the path, or copy the file");
  }
  const int64_t expected = num_tokens * TokenBytes(type);
  if (file.size_bytes() != static_cast<uint64_t>(expected))
    throw DataError(path + ": is " + std::to_string(file.size_bytes()) + " bytes long, expected " +
                    std::to_string(expected) + " bytes for the " + std::to_string(num_tokens) + " " +
                    TokenTypeName(type) + " tokens that the corpus lists: " + kRewrite);
  if (maps_[shard].compare_exchange_strong(map, file.data(), std::memory_order_acq_rel)) return file.Release();
  return map;
}

template <typename Out>
void TokenReader::Read(const int64_t* starts, int64_t rows, int64_t length, int64_t vocab_size, Out* out) {
  if (vocab_size < 1 || vocab_size - 1 > std::numeric_limits<Out>::max())
    throw DataError("vocab_size is " + std::to_string(vocab_size) + ", expected 1 to " +
                    std::to_string(static_cast<uint64_t>(std::numeric_limits<Out>::max()) + 1) +
                    ", what the type of the buffer can hold");
  for (int64_t row = 0; row < rows; ++row) {
    // read once: another thread may be writing to the caller's array
    int64_t position = starts[row];
    if (position < 0 || position > num_tokens() - length)
      throw std::out_of_range("window " + std::to_string(row) + " of " + std::to_string(length) +
                              " tokens was asked for at token " + std::to_string(position) + ", the shards have " +
                              std::to_string(num_tokens()) + " tokens");
    const int64_t end = position + length;
    size_t shard =
        static_cast<size_t>(std::upper_bound(starts_.begin(), starts_.end(), position) - starts_.begin()) - 1;
    for (; position < end; ++shard) {
      const int64_t offset = position - starts_[shard];
      const int64_t count = std::min(end, starts_[shard + 1]) - position;
      const TokenType type = shards_[shard].token_type;
      const std::byte* tokens = Map(shard) + offset * TokenBytes(type);
      if (!CopyTokens(type, tokens, count, vocab_size, out))
        ThrowAtInvalidToken(type, tokens, count, vocab_size, shards_[shard].bin_path, offset);
      out += count;
      position += count;
    }
  }
}

template void TokenReader::Read(const int64_t*, int64_t, int64_t, int64_t, uint16_t*);
template void TokenReader::Read(const int64_t*, int64_t, int64_t, int64_t, int32_t*);
template void TokenReader::Read(const int64_t*, int64_t, int64_t, int64_t, int64_t*);

}  // namespace illada
