// The parser of a shard's index (format: builder.h). It works on bytes in memory, which may be anything: what it
// accepts is consistent as far as said, and no content makes it read outside of the bytes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "errors.h"
#include "token_type.h"

namespace illada {

// Tokens [begin, end) of a shard's stream.
struct TokenRange {
  int64_t begin;
  int64_t end;
};

class IndexView {
 public:
  static constexpr int64_t kHeaderBytes = 34;
  static constexpr char kMagic[] = "MMIDIDX\0";  // nine bytes with the one the compiler adds

  // `bytes` [size_bytes] must outlive the view and need no alignment; bin_bytes is the size of the shard's .bin; the
  // paths are for messages. Takes constant time and touches the ends of the arrays only. Throws DataError unless the
  // header is right, the size is what it announces, the first sequence begins at byte 0, the last one ends at
  // bin_bytes > 0, and the documents span all sequences. What lies between is left to Check*() and to the accessors.
  IndexView(const std::byte* bytes, uint64_t size_bytes, uint64_t bin_bytes, std::string idx_path,
            std::string bin_path);

  TokenType token_type() const { return token_type_; }
  int64_t num_sequences() const { return num_sequences_; }
  int64_t num_documents() const { return num_documents_; }
  int64_t num_tokens() const { return num_tokens_; }
  const std::string& idx_path() const { return idx_path_; }
  const std::string& bin_path() const { return bin_path_; }

  // The first bytes of an index file.
  static std::array<char, kHeaderBytes> Header(TokenType token_type, int64_t num_sequences, int64_t num_documents);

  // The raw entries; no checks. sequence in [0, num_sequences), document in [0, num_documents].
  int32_t Length(int64_t sequence) const;
  int64_t Pointer(int64_t sequence) const;
  int64_t Bound(int64_t document) const;
  // Where entry 0 of each array lies in the file.
  uint64_t lengths_offset() const { return kHeaderBytes; }
  uint64_t pointers_offset() const { return kHeaderBytes + 4 * static_cast<uint64_t>(num_sequences_); }
  uint64_t bounds_offset() const { return kHeaderBytes + 12 * static_cast<uint64_t>(num_sequences_); }

  // Tokens of document `document` in [0, num_documents). Throws DataError when its entries make no sense.
  TokenRange Document(int64_t document) const;

  // Throw DataError at the first of sequences (documents) [begin, end) whose entries contradict their neighbours'.
  // Lengths, byte offsets and document bounds tell one story when all of them pass. Linear time.
  void CheckSequences(int64_t begin, int64_t end) const;
  void CheckDocuments(int64_t begin, int64_t end) const;

 private:
  DataError Error(const std::string& found, const std::string& expected) const;
  void CheckEnds(uint64_t bin_bytes);
  int64_t SequenceStart(int64_t sequence) const;
  int64_t DocumentStart(int64_t document) const;

  const std::byte* bytes_;
  std::string idx_path_;
  std::string bin_path_;
  TokenType token_type_ = TokenType::kUint16;
  int64_t token_bytes_ = 0;
  int64_t num_sequences_ = 0;
  int64_t num_documents_ = 0;
  int64_t num_tokens_ = 0;
};

}  // namespace illada
