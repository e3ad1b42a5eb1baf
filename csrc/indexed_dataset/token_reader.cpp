#include "token_reader.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <stdexcept>
#include <utility>

#include "bus_error.h"
#include "errors.h"
#include "token_copy.h"

namespace illada {
namespace {

// Read at a time; stays in a core's second-level cache until it is converted.
constexpr int64_t kPieceBytes = 1 << 16;

uint64_t NextNumber() {
  static std::atomic<uint64_t> next{0};
  return next++;
}

// What the readers of the process have of the maps that it may make. No lock: a fork might leave it locked.
class MapBudget {
 public:
  bool Take(int64_t maps, int64_t bytes) {
    if (maps > TokenReader::kMostMaps || bytes > TokenReader::kMostMappedBytes) return false;
    const int64_t other_maps = maps_.fetch_add(maps), other_bytes = bytes_.fetch_add(bytes);
    if (other_maps <= TokenReader::kMostMaps - maps && other_bytes <= TokenReader::kMostMappedBytes - bytes)
      return true;
    Return(maps, bytes);
    return false;
  }
  void Return(int64_t maps, int64_t bytes) {
    maps_ -= maps;
    bytes_ -= bytes;
  }

 private:
  std::atomic<int64_t> maps_{0};
  std::atomic<int64_t> bytes_{0};
};

MapBudget map_budget;

// In place of a map that the system has refused.
constexpr std::byte kRefused{};

int64_t Bytes(const ShardTokens& shard) { return shard.num_tokens * TokenBytes(shard.token_type); }

}  // namespace

TokenReader::TokenReader(std::vector<ShardTokens> shards) : number_(NextNumber()), shards_(std::move(shards)) {
  if (shards_.empty()) throw DataError("no shards were given, expected at least one");
  // bytes have to be countable too, and a token has up to 8
  constexpr int64_t kMostTokens = std::numeric_limits<int64_t>::max() / 8;
  starts_.reserve(shards_.size() + 1);
  starts_.push_back(0);
  for (const ShardTokens& shard : shards_) {
    if (shard.num_tokens < 1 || shard.num_tokens > kMostTokens - starts_.back())
      throw DataError(shard.bin_path + ": holds " + std::to_string(shard.num_tokens) +
                      " tokens, expected 1 or more, and at most " + std::to_string(kMostTokens) + " in all shards");
    starts_.push_back(starts_.back() + shard.num_tokens);
    bytes_ += Bytes(shard);
  }
  if (!map_budget.Take(num_shards(), bytes_)) return;
  maps_ = std::make_unique<std::atomic<const std::byte*>[]>(shards_.size());
  for (size_t i = 0; i < shards_.size(); ++i) maps_[i].store(nullptr, std::memory_order_relaxed);
}

TokenReader::~TokenReader() {
  OpenFiles::OfProcess().DropAll(number_);
  if (maps_ == nullptr) return;
  for (size_t i = 0; i < shards_.size(); ++i)
    if (const std::byte* map = maps_[i].load(); map != nullptr && map != &kRefused)
      munmap(const_cast<std::byte*>(map), static_cast<size_t>(Bytes(shards_[i])));
  map_budget.Return(num_shards(), bytes_);
}

// The .bin of shard `shard`, as long as the corpus says.
std::shared_ptr<const OpenFile> TokenReader::Open(size_t shard) const {
  const ShardTokens& expected = shards_[shard];
  std::shared_ptr<const OpenFile> file;
  try {
    file = std::make_shared<const OpenFile>(expected.bin_path);
  } catch (const DiskError& error) {
    if (error.code().value() != ENOENT) throw;
    throw DataError(expected.bin_path +
                    ": no such file; the corpus lists it as a shard: correct the path, or copy the file");
  }
  if (file->size_bytes() != static_cast<uint64_t>(Bytes(expected)))
    throw DataError(expected.bin_path + ": is " + std::to_string(file->size_bytes()) + " bytes long, expected " +
                    std::to_string(Bytes(expected)) + " bytes for the " + std::to_string(expected.num_tokens) + " " +
                    TokenTypeName(expected.token_type) + " tokens that the corpus lists: " + kRewrite);
  return file;
}

// First byte of shard `shard`, or kRefused where the system refuses the map (file systems that have none, too many
// maps): it is asked once. Threads that come first together each map the file; one of the maps is kept.
const std::byte* TokenReader::Map(size_t shard) {
  const std::byte* map = maps_[shard].load(std::memory_order_acquire);
  if (map != nullptr) return map;
  InstallBusErrorHandler();
  const auto bytes = static_cast<size_t>(Bytes(shards_[shard]));
  void* made = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, Open(shard)->descriptor(), 0);
  const std::byte* mine = made == MAP_FAILED ? &kRefused : static_cast<const std::byte*>(made);
  if (maps_[shard].compare_exchange_strong(map, mine, std::memory_order_acq_rel)) return mine;
  if (made != MAP_FAILED) munmap(made, bytes);
  return map;
}

// Copies tokens [offset, offset + count) of a shard from its map; false where that cannot be, or an id is not in the
// vocabulary.
template <typename Out>
bool TokenReader::ReadMap(size_t shard, int64_t offset, int64_t count, int64_t vocab_size, Out* out) {
  const TokenType type = shards_[shard].token_type;
  const std::byte* map = Map(shard);
  if (map == &kRefused) return false;
  bool valid = false;
  return CopyWithoutBusError(
             [&] { valid = CopyTokens(type, map + offset * TokenBytes(type), count, vocab_size, out); }) &&
         valid;
}

// The same by pread. Whatever is wrong is an exception.
template <typename Out>
void TokenReader::ReadFile(size_t shard, int64_t offset, int64_t count, int64_t vocab_size, Out* out) {
  const TokenType type = shards_[shard].token_type;
  const OpenFiles::Key key(number_, shard);
  std::shared_ptr<const OpenFile> file = OpenFiles::OfProcess().Find(key);
  if (file == nullptr) {
    file = Open(shard);
    OpenFiles::OfProcess().Keep(key, file);
  }
  const int64_t piece = std::min(count, kPieceBytes / TokenBytes(type));
  const std::unique_ptr<std::byte[]> buffer(new std::byte[static_cast<size_t>(piece * TokenBytes(type))]);
  for (int64_t done = 0; done < count; done += piece) {
    const int64_t now = std::min(piece, count - done);
    try {
      file->Read(static_cast<uint64_t>((offset + done) * TokenBytes(type)), static_cast<size_t>(now * TokenBytes(type)),
                 buffer.get());
    } catch (...) {
      OpenFiles::OfProcess().Drop(key);  // a file server may have forgotten it (ESTALE): whoever tries again opens it
      throw;
    }
    if (!CopyTokens(type, buffer.get(), now, vocab_size, out + done))
      ThrowAtInvalidToken(type, buffer.get(), now, vocab_size, shards_[shard].bin_path, offset + done);
  }
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
      if (!mapped() || !ReadMap(shard, offset, count, vocab_size, out)) ReadFile(shard, offset, count, vocab_size, out);
      out += count;
      position += count;
    }
  }
}

template void TokenReader::Read(const int64_t*, int64_t, int64_t, int64_t, uint16_t*);
template void TokenReader::Read(const int64_t*, int64_t, int64_t, int64_t, int32_t*);
template void TokenReader::Read(const int64_t*, int64_t, int64_t, int64_t, int64_t*);

}  // namespace illada
