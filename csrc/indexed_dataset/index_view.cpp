#include "index_view.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the format is little endian and read as it lies in memory");

namespace illada {
namespace {

// Counts in a hostile header go up to 2^64 - 1; their bytes need 69 bits.
using Wide = unsigned __int128;

constexpr uint64_t kVersion = 1;
constexpr size_t kMagicBytes = sizeof(IndexView::kMagic);
static_assert(kMagicBytes == 9);

template <typename Value>
Value Load(const std::byte* from) {
  // the header has 34 bytes, so nothing behind it is aligned
  Value value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

std::string ToString(Wide value) {
  std::string digits;
  do digits += static_cast<char>('0' + static_cast<int>(value % 10));
  while ((value /= 10) != 0);
  std::reverse(digits.begin(), digits.end());
  return digits;
}

// As Python writes bytes.
std::string Quoted(const std::byte* bytes, size_t count) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text = "b'";
  for (size_t i = 0; i < count; ++i) {
    const auto byte = std::to_integer<unsigned char>(bytes[i]);
    if (byte >= 0x20 && byte < 0x7f && byte != '\'' && byte != '\\') {
      text += static_cast<char>(byte);
    } else {
      text += "\\x";
      text += kDigits[byte >> 4];
      text += kDigits[byte & 15];
    }
  }
  return text + "'";
}

std::string KnownTypes() {
  std::string text;
  for (const TokenType type : kTokenTypes)
    text += (text.empty() ? "" : ", ") + std::to_string(static_cast<int>(type)) + " (" + TokenTypeName(type) + ")";
  return text;
}

}  // namespace

IndexView::IndexView(const std::byte* bytes, uint64_t size_bytes, uint64_t bin_bytes, std::string idx_path,
                     std::string bin_path)
    : bytes_(bytes), idx_path_(std::move(idx_path)), bin_path_(std::move(bin_path)) {
  const std::string is_long = "is " + std::to_string(size_bytes) + " bytes long";
  if (size_bytes < kHeaderBytes) throw Error(is_long, "a header of " + std::to_string(kHeaderBytes) + " bytes");
  if (std::memcmp(bytes, kMagic, kMagicBytes) != 0)
    throw Error("starts with " + Quoted(bytes, kMagicBytes),
                Quoted(reinterpret_cast<const std::byte*>(kMagic), kMagicBytes) + " (Megatron's MMIDIDX index)");
  const auto version = Load<uint64_t>(bytes + 9);
  if (version != kVersion) throw Error("has format version " + std::to_string(version), std::to_string(kVersion));
  const auto code = Load<uint8_t>(bytes + 17);
  const auto type = TokenTypeOfCode(code);
  if (!type) throw Error("has dtype code " + std::to_string(code), "an integer type: " + KnownTypes());
  token_type_ = *type;
  token_bytes_ = TokenBytes(token_type_);

  const auto num_sequences = Load<uint64_t>(bytes + 18);
  const auto num_bounds = Load<uint64_t>(bytes + 26);
  if (num_bounds < 1) throw Error("has 0 document bounds", "the number of documents + 1");
  const Wide expected = kHeaderBytes + Wide{12} * num_sequences + Wide{8} * num_bounds;
  if (num_sequences > 0 && size_bytes == expected + num_sequences)
    throw Error("has a mode for each sequence (a multimodal index)", "none: multimodal data sets are not read");
  if (size_bytes != expected)
    throw Error(is_long, ToString(expected) + " bytes for the " + std::to_string(num_sequences) + " sequences and " +
                             std::to_string(num_bounds) + " document bounds it announces");
  // both counts are below a 12th and an 8th of a file's size now
  num_sequences_ = static_cast<int64_t>(num_sequences);
  num_documents_ = static_cast<int64_t>(num_bounds) - 1;
  CheckEnds(bin_bytes);
}

void IndexView::CheckEnds(uint64_t bin_bytes) {
  Wide end_bytes = 0;
  if (num_sequences_ > 0) {
    const int64_t last = num_sequences_ - 1;
    if (Length(last) < 0)
      throw Error("gives sequence " + std::to_string(last) + " the length " + std::to_string(Length(last)),
                  "0 or more tokens");
    if (Pointer(0) != 0) throw Error("places sequence 0 at byte " + std::to_string(Pointer(0)), "byte 0");
    if (Pointer(last) < 0 || Pointer(last) % token_bytes_ != 0)
      throw Error("places sequence " + std::to_string(last) + " at byte " + std::to_string(Pointer(last)),
                  "a multiple of " + std::to_string(token_bytes_) + ", the size of a token");
    end_bytes = static_cast<Wide>(Pointer(last)) + static_cast<Wide>(Length(last)) * static_cast<Wide>(token_bytes_);
    if (end_bytes > static_cast<Wide>(std::numeric_limits<int64_t>::max()))
      throw Error("ends at byte " + ToString(end_bytes), "less than 2^63, the largest file");
  }
  if (Bound(0) != 0 || Bound(num_documents_) != num_sequences_)
    throw Error(
        "has documents from sequence " + std::to_string(Bound(0)) + " to " + std::to_string(Bound(num_documents_)),
        "from 0 to " + std::to_string(num_sequences_) + ", the number of sequences");
  const auto token_bytes = static_cast<Wide>(token_bytes_);
  if (bin_bytes != end_bytes)
    throw DataError(bin_path_ + ": is " + std::to_string(bin_bytes) + " bytes long, expected " + ToString(end_bytes) +
                    " bytes for the " + ToString(end_bytes / token_bytes) + " " + TokenTypeName(token_type_) +
                    " tokens that " + idx_path_ + " lists: " + kRewrite);
  if (bin_bytes == 0) throw DataError(bin_path_ + ": the shard holds no tokens, expected at least 1: " + kRewrite);
  num_tokens_ = static_cast<int64_t>(bin_bytes / static_cast<uint64_t>(token_bytes_));
}

std::array<char, IndexView::kHeaderBytes> IndexView::Header(TokenType token_type, int64_t num_sequences,
                                                            int64_t num_documents) {
  std::array<char, kHeaderBytes> header;
  char* to = header.data();
  const auto append = [&to](const void* bytes, size_t count) {
    std::memcpy(to, bytes, count);
    to += count;
  };
  const int64_t num_bounds = num_documents + 1;
  append(kMagic, kMagicBytes);
  append(&kVersion, sizeof(kVersion));
  append(&token_type, sizeof(token_type));
  append(&num_sequences, sizeof(num_sequences));
  append(&num_bounds, sizeof(num_bounds));
  return header;
}

DataError IndexView::Error(const std::string& found, const std::string& expected) const {
  return DataError(idx_path_ + ": " + found + ", expected " + expected + ": " + kRewrite);
}

int32_t IndexView::Length(int64_t sequence) const { return Load<int32_t>(bytes_ + lengths_offset() + 4 * sequence); }
int64_t IndexView::Pointer(int64_t sequence) const { return Load<int64_t>(bytes_ + pointers_offset() + 8 * sequence); }
int64_t IndexView::Bound(int64_t document) const { return Load<int64_t>(bytes_ + bounds_offset() + 8 * document); }

// Stream offset at which `sequence` in [0, num_sequences] begins; the one after the last begins at the end.
int64_t IndexView::SequenceStart(int64_t sequence) const {
  if (sequence == num_sequences_) return num_tokens_;
  const int64_t pointer = Pointer(sequence);
  if (pointer < 0 || pointer > num_tokens_ * token_bytes_ || pointer % token_bytes_ != 0)
    throw Error("places sequence " + std::to_string(sequence) + " at byte " + std::to_string(pointer),
                "a multiple of " + std::to_string(token_bytes_) + " up to " +
                    std::to_string(num_tokens_ * token_bytes_) + ", the size of the .bin");
  return pointer / token_bytes_;
}

// Stream offset at which `document` in [0, num_documents] begins.
int64_t IndexView::DocumentStart(int64_t document) const {
  const int64_t sequence = Bound(document);
  if (sequence < 0 || sequence > num_sequences_)
    throw Error("begins document " + std::to_string(document) + " at sequence " + std::to_string(sequence),
                "0 to " + std::to_string(num_sequences_) + ", the number of sequences");
  return SequenceStart(sequence);
}

TokenRange IndexView::Document(int64_t document) const {
  const TokenRange range{DocumentStart(document), DocumentStart(document + 1)};
  if (range.begin <= range.end) return range;
  throw Error("places document " + std::to_string(document) + " at tokens " + std::to_string(range.begin) + " to " +
                  std::to_string(range.end),
              "an end that is not before the beginning");
}

void IndexView::CheckSequences(int64_t begin, int64_t end) const {
  // where the sequence before ends; of sequence 0 opening has made sure. Unsigned: what was not checked may wrap.
  const auto end_of = [this](int64_t sequence) {
    return static_cast<uint64_t>(Pointer(sequence)) +
           static_cast<uint64_t>(Length(sequence)) * static_cast<uint64_t>(token_bytes_);
  };
  uint64_t expected = begin > 0 ? end_of(begin - 1) : 0;
  for (int64_t i = begin; i < end; ++i) {
    if (Length(i) < 0)
      throw Error("gives sequence " + std::to_string(i) + " the length " + std::to_string(Length(i)),
                  "0 or more tokens");
    if (static_cast<uint64_t>(Pointer(i)) != expected)
      throw Error("places sequence " + std::to_string(i) + " at byte " + std::to_string(Pointer(i)),
                  "byte " + std::to_string(expected) + ", where the sequences before it end");
    expected = end_of(i);
  }
}

void IndexView::CheckDocuments(int64_t begin, int64_t end) const {
  for (int64_t i = begin; i < end; ++i)
    if (Bound(i + 1) < Bound(i))
      throw Error("ends document " + std::to_string(i) + " at sequence " + std::to_string(Bound(i + 1)),
                  "sequence " + std::to_string(Bound(i)) + " (its start) or later");
}

}  // namespace illada
