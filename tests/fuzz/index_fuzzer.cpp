// libFuzzer target: whatever bytes an .idx holds, opening and checking it end in an answer or a DataError,
// never in a bad memory access or undefined arithmetic. Built and run by `make fuzz`; seeds beside this file.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "index_view.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace {

using illada::IndexView;

constexpr size_t kHeaderBytes = IndexView::kHeaderBytes;

void Require(bool condition) {
  if (!condition) std::abort();
}

// Where the last sequence ends, if the header is in order: the size of .bin that such an index asks for.
uint64_t AnnouncedBinBytes(const uint8_t* data, size_t size) {
  if (size < kHeaderBytes) return 0;
  uint64_t sequences;
  std::memcpy(&sequences, data + 18, sizeof(sequences));
  if (sequences == 0 || sequences > (size - kHeaderBytes) / 12) return 0;
  uint32_t length;
  uint64_t pointer;
  std::memcpy(&length, data + kHeaderBytes + 4 * (sequences - 1), sizeof(length));
  std::memcpy(&pointer, data + kHeaderBytes + 4 * sequences + 8 * (sequences - 1), sizeof(pointer));
  const uint64_t token_bytes = data[17] == 5 ? 8 : data[17] == 4 ? 4 : 2;
  return pointer + length * token_bytes;
}

void Exercise(const IndexView& view) {
  const int64_t tokens = view.num_tokens();
  Require(tokens > 0 && view.num_sequences() > 0 && view.num_documents() > 0);
  for (int64_t i = 0; i < std::min<int64_t>(view.num_documents(), 64); ++i) {
    try {
      const illada::TokenRange range = view.Document(i);
      Require(0 <= range.begin && range.begin <= range.end && range.end <= tokens);
    } catch (const illada::DataError&) {
    }
  }
  bool consistent = false;
  try {
    view.CheckSequences(0, view.num_sequences() / 2);
    view.CheckSequences(view.num_sequences() / 2, view.num_sequences());
    view.CheckDocuments(0, view.num_documents());
    consistent = true;
  } catch (const illada::DataError&) {
  }
  if (!consistent) return;
  // what passes the full check is whole: documents follow one another from the first token to the last
  int64_t position = 0;
  for (int64_t i = 0; i < view.num_documents(); ++i) {
    const illada::TokenRange range = view.Document(i);
    Require(range.begin == position);
    position = range.end;
  }
  Require(position == tokens);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // a copy of exactly this size: AddressSanitizer then sees a read of one byte too many
  const std::unique_ptr<std::byte[]> bytes(new std::byte[size]);
  if (size > 0) std::memcpy(bytes.get(), data, size);
  for (const uint64_t bin_bytes : {AnnouncedBinBytes(data, size), uint64_t{22}}) {
    try {
      Exercise(IndexView(bytes.get(), size, bin_bytes, "fuzz.idx", "fuzz.bin"));
    } catch (const illada::DataError&) {
    }
  }
  return 0;
}

// Most mutations break the header, and nothing behind it would be tried: three of four get one that fits their size,
// and two of four the outer entries that opening asks for.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed) {
  size = LLVMFuzzerMutate(data, size, max_size);
  if (seed % 4 == 0 || size < kHeaderBytes + 12 + 16) return size;
  const uint64_t room = size - kHeaderBytes - 16;
  const uint64_t sequences = 1 + (seed / 4) % (room / 12);
  const uint64_t bounds = 2 + (room - 12 * sequences) / 8;
  size = kHeaderBytes + 12 * sequences + 8 * bounds;
  const uint64_t version = 1, zero = 0;
  const uint8_t codes[] = {3, 4, 5, 8};
  std::memcpy(data, IndexView::kMagic, 9);
  std::memcpy(data + 9, &version, 8);
  data[17] = codes[seed / 16 % 4];
  std::memcpy(data + 18, &sequences, 8);
  std::memcpy(data + 26, &bounds, 8);
  if (seed % 4 == 1) return size;
  uint8_t* pointers = data + kHeaderBytes + 4 * sequences;
  uint8_t* document_bounds = pointers + 8 * sequences;
  std::memcpy(pointers, &zero, 8);
  pointers[8 * (sequences - 1)] &= 0xf8;
  pointers[8 * sequences - 1] &= 0x7f;
  data[kHeaderBytes + 4 * sequences - 1] &= 0x7f;
  std::memcpy(document_bounds, &zero, 8);
  std::memcpy(document_bounds + 8 * (bounds - 1), &sequences, 8);
  return size;
}
