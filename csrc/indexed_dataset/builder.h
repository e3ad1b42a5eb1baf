// Writes a shard of tokens in Megatron's MMIDIDX format, version 1.
//
//   PREFIX.bin   the tokens of all documents, one after another; uint16 or int32, little endian, no header
//   PREFIX.idx   char[9] "MMIDIDX\0\0" | u64 version = 1 | u8 dtype code | u64 sequences n | u64 document bounds n + 1
//                | i32[n] sequence lengths in tokens | i64[n] byte offsets in .bin | i64[n + 1] document bounds 0..n
//
// A document is one sequence here. Independent of Python and of torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "output_file.h"

namespace illada {

// Collects documents into PREFIX.bin + SUFFIX; Finalize() completes it and writes PREFIX.idx + SUFFIX. Their names as a
// shard are given by the caller. Abort() (or the destructor, before Finalize()) leaves nothing. Not thread-safe.
class IndexedDatasetBuilder {
 public:
  // suffix: of this writer alone; a file of such a name must not be there. Ids must lie in [0, vocab_size); they are
  // stored as uint16 where vocab_size <= 65536, else as int32.
  IndexedDatasetBuilder(std::string prefix, std::string suffix, int64_t vocab_size);
  ~IndexedDatasetBuilder();
  IndexedDatasetBuilder(const IndexedDatasetBuilder&) = delete;
  IndexedDatasetBuilder& operator=(const IndexedDatasetBuilder&) = delete;

  static constexpr int64_t kNoEndToken = -1;

  // Appends `num_documents` documents whose tokens lie one after another in tokens[0, num_tokens), each followed by
  // `end_token` unless that is kNoEndToken; `lengths` do not count it.
  // All or nothing: a batch with a bad id or lengths that do not add up throws DataError, writes nothing.
  template <typename Token>
  void Add(const Token* tokens, int64_t num_tokens, const int64_t* lengths, int64_t num_documents,
           int64_t end_token = kNoEndToken);

  // Writes the index and flushes both files to the device; throws DataError where they are not as long as they should
  // be then.
  void Finalize();
  void Abort() noexcept;

  int64_t num_tokens() const { return num_tokens_; }
  int64_t num_documents() const { return static_cast<int64_t>(lengths_.size()); }
  bool wide() const { return wide_; }

 private:
  enum class State { kOpen, kFinished, kAborted };

  void RequireOpen() const;
  template <typename Token>
  void CheckBatch(const Token* tokens, int64_t num_tokens, const int64_t* lengths, int64_t num_documents,
                  int64_t end_token) const;
  template <typename Stored, typename Token>
  void AppendDocuments(const Token* tokens, const int64_t* lengths, int64_t num_documents, int64_t end_token);
  void WriteIndex();

  std::string prefix_;
  std::string suffix_;
  int64_t vocab_size_;
  bool wide_;
  State state_ = State::kOpen;
  int owner_process_;
  int64_t num_tokens_ = 0;
  std::vector<int32_t> lengths_;  // tokens of each document
  OutputFile bin_;
  OutputFile idx_;
};

}  // namespace illada
