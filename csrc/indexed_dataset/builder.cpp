#include "builder.h"

#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <utility>

#include "errors.h"
#include "index_view.h"
#include "token_copy.h"
#include "token_type.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "the format is little endian and written as it lies in memory");

namespace illada {
namespace {

constexpr int64_t kTokensAtATime = int64_t{1} << 15;
constexpr int64_t kUint16Vocabulary = 65536;

template <typename Token>
constexpr TokenType kTypeOf = sizeof(Token) == 2   ? TokenType::kUint16
                              : sizeof(Token) == 4 ? TokenType::kInt32
                                                   : TokenType::kInt64;

}  // namespace

IndexedDatasetBuilder::IndexedDatasetBuilder(std::string prefix, std::string suffix, int64_t vocab_size)
    : prefix_(std::move(prefix)),
      suffix_(std::move(suffix)),
      vocab_size_(vocab_size),
      wide_(vocab_size > kUint16Vocabulary),
      owner_process_(getpid()) {
  if (vocab_size < 1 || vocab_size - 1 > std::numeric_limits<int32_t>::max())
    throw DataError("vocab_size is " + std::to_string(vocab_size) + ", expected 1 to 2147483648");
  bin_.Create(prefix_ + ".bin" + suffix_);
}

IndexedDatasetBuilder::~IndexedDatasetBuilder() { Abort(); }

void IndexedDatasetBuilder::RequireOpen() const {
  if (state_ == State::kOpen) return;
  throw DataError(prefix_ + ": the writer was already " + (state_ == State::kFinished ? "finished" : "aborted") +
                  "; make a new one");
}

template <typename Token>
void IndexedDatasetBuilder::CheckBatch(const Token* tokens, int64_t num_tokens, const int64_t* lengths,
                                       int64_t num_documents, int64_t end_token) const {
  const int64_t longest = std::numeric_limits<int32_t>::max() - (end_token != kNoEndToken);
  int64_t sum = 0;
  for (int64_t i = 0; i < num_documents; ++i) {
    if (lengths[i] < 0 || lengths[i] > longest)
      throw DataError(prefix_ + ": document " + std::to_string(this->num_documents() + i) + " has length " +
                      std::to_string(lengths[i]) + ", expected 0 to " + std::to_string(longest) + " tokens");
    sum += lengths[i];
  }
  if (sum != num_tokens)
    throw DataError(prefix_ + ": the document lengths add up to " + std::to_string(sum) + " but " +
                    std::to_string(num_tokens) + " tokens were given");
  const std::string advice = " is not in the vocabulary of size " + std::to_string(vocab_size_) +
                             ": write with the vocab_size of the tokenizer that made these ids";
  if (end_token < kNoEndToken || end_token >= vocab_size_)
    throw DataError(prefix_ + ": the end token " + std::to_string(end_token) + advice);
  if (TokensAreValid(kTypeOf<Token>, reinterpret_cast<const std::byte*>(tokens), num_tokens, vocab_size_)) return;
  const auto bad = std::find_if(tokens, tokens + num_tokens, [this](Token token) {
    return static_cast<int64_t>(token) < 0 || static_cast<int64_t>(token) >= vocab_size_;
  });
  const int64_t position = bad - tokens;
  int64_t document = 0;
  for (int64_t end = lengths[0]; end <= position; end += lengths[document]) ++document;
  throw DataError(prefix_ + ": token id " + std::to_string(static_cast<int64_t>(*bad)) + " at token offset " +
                  std::to_string(num_tokens_ + position + (end_token != kNoEndToken ? document : 0)) + " (document " +
                  std::to_string(this->num_documents() + document) + ")" + advice);
}

// Gathers documents, converted and with their ends, in blocks that stay in the cache. CheckBatch() has passed.
template <typename Stored, typename Token>
void IndexedDatasetBuilder::AppendDocuments(const Token* tokens, const int64_t* lengths, int64_t num_documents,
                                            int64_t end_token) {
  std::vector<Stored> block(kTokensAtATime);
  int64_t filled = 0;
  const auto flush_if_full = [&] {
    if (filled < kTokensAtATime) return;
    bin_.Append(block.data(), static_cast<size_t>(filled) * sizeof(Stored));
    filled = 0;
  };
  for (int64_t i = 0; i < num_documents; ++i) {
    for (int64_t left = lengths[i]; left > 0;) {
      const int64_t count = std::min(left, kTokensAtATime - filled);
      CopyTokens(kTypeOf<Token>, reinterpret_cast<const std::byte*>(tokens), count, vocab_size_, &block[filled]);
      tokens += count;
      left -= count;
      filled += count;
      flush_if_full();
    }
    if (end_token == kNoEndToken) continue;
    block[filled++] = static_cast<Stored>(end_token);
    flush_if_full();
  }
  bin_.Append(block.data(), static_cast<size_t>(filled) * sizeof(Stored));
}

template <typename Token>
void IndexedDatasetBuilder::Add(const Token* tokens, int64_t num_tokens, const int64_t* lengths, int64_t num_documents,
                                int64_t end_token) {
  RequireOpen();
  CheckBatch(tokens, num_tokens, lengths, num_documents, end_token);
  const int64_t ends = end_token != kNoEndToken;
  try {
    if (wide_)
      AppendDocuments<int32_t>(tokens, lengths, num_documents, end_token);
    else
      AppendDocuments<uint16_t>(tokens, lengths, num_documents, end_token);
    std::transform(lengths, lengths + num_documents, std::back_inserter(lengths_),
                   [ends](int64_t length) { return static_cast<int32_t>(length + ends); });
  } catch (...) {
    // half a batch may have reached the file: it must never get an index
    Abort();
    throw;
  }
  num_tokens_ += num_tokens + ends * num_documents;
}

template void IndexedDatasetBuilder::Add(const uint16_t*, int64_t, const int64_t*, int64_t, int64_t);
template void IndexedDatasetBuilder::Add(const int32_t*, int64_t, const int64_t*, int64_t, int64_t);
template void IndexedDatasetBuilder::Add(const int64_t*, int64_t, const int64_t*, int64_t, int64_t);

void IndexedDatasetBuilder::Finalize() {
  RequireOpen();
  try {
    if (num_tokens_ == 0) throw DataError(prefix_ + ": no tokens were added; an empty shard is not written");
    bin_.Sync();
    idx_.Create(prefix_ + ".idx" + suffix_);
    WriteIndex();
    idx_.Sync();
  } catch (...) {
    Abort();
    throw;
  }
  state_ = State::kFinished;
  bin_.Close();
  idx_.Close();
}

void IndexedDatasetBuilder::WriteIndex() {
  const auto append_value = [this](auto value) { idx_.Append(&value, sizeof(value)); };
  const int64_t count = num_documents();
  const int64_t token_bytes = wide_ ? sizeof(int32_t) : sizeof(uint16_t);
  const auto header = IndexView::Header(wide_ ? TokenType::kInt32 : TokenType::kUint16, count, count);
  idx_.Append(header.data(), header.size());
  idx_.Append(lengths_.data(), lengths_.size() * sizeof(int32_t));
  int64_t offset_bytes = 0;
  for (const int32_t length : lengths_) {
    append_value(offset_bytes);
    offset_bytes += length * token_bytes;
  }
  for (int64_t bound = 0; bound <= count; ++bound) append_value(bound);
}

void IndexedDatasetBuilder::Abort() noexcept {
  // a forked child that inherited this object must not remove its parent's files
  if (state_ != State::kOpen || getpid() != owner_process_) return;
  state_ = State::kAborted;
  bin_.Remove();
  idx_.Remove();
}

}  // namespace illada
