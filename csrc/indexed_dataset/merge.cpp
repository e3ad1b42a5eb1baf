#include "merge.h"

#include <algorithm>
#include <cerrno>

#include "errors.h"
#include "index_file.h"
#include "output_file.h"

namespace illada {
namespace {

constexpr int64_t kEntriesAtATime = int64_t{1} << 20;

using Progress = std::function<void(uint64_t)>;

struct Input {
  std::string prefix;
  TokenType token_type;
  int64_t num_sequences;
  int64_t num_documents;
  uint64_t bin_bytes;
};

IndexFile OpenIndex(const std::string& prefix) {
  try {
    return IndexFile(prefix + ".idx", prefix + ".bin");
  } catch (const DiskError& error) {
    if (error.code().value() != ENOENT) throw;
    throw DataError(error.path() + ": no such file; a shard is PREFIX.bin and PREFIX.idx: correct the path");
  }
}

// An index is opened once for each of its arrays, not kept open: thousands of inputs must not exhaust the maps.
IndexFile OpenAgain(const Input& input) {
  IndexFile index = OpenIndex(input.prefix);
  const IndexView& view = index.view();
  if (view.num_sequences() != input.num_sequences || view.num_documents() != input.num_documents ||
      view.token_type() != input.token_type ||
      static_cast<uint64_t>(view.num_tokens() * TokenBytes(view.token_type())) != input.bin_bytes)
    throw DataError(view.idx_path() + ": changed while it was merged, expected a finished shard");
  return index;
}

Input CheckInput(const std::string& prefix, const Progress& progress) {
  const IndexFile index = OpenIndex(prefix);
  const IndexView& view = index.view();
  const int64_t entries = std::max(view.num_sequences(), view.num_documents());
  for (int64_t begin = 0; begin < entries; begin += kEntriesAtATime) {
    index.Check(begin, begin + kEntriesAtATime);
    progress(0);
  }
  return {prefix, view.token_type(), view.num_sequences(), view.num_documents(),
          static_cast<uint64_t>(view.num_tokens() * TokenBytes(view.token_type()))};
}

// Writes entries [0, count) of an array: entry i is get(i).
template <typename Value, typename Get>
void AppendEntries(OutputFile& to, const IndexFile& index, uint64_t offset, int64_t count, const Progress& progress,
                   Get get) {
  std::vector<Value> block;
  for (int64_t begin = 0; begin < count; begin += kEntriesAtATime) {
    const int64_t end = std::min(count, begin + kEntriesAtATime);
    block.clear();
    for (int64_t i = begin; i < end; ++i) block.push_back(get(i));
    to.Append(block.data(), block.size() * sizeof(Value));
    index.Forget(offset, sizeof(Value), begin, end);
    progress(0);
  }
}

void WriteIndex(OutputFile& idx, const std::vector<Input>& inputs, const Progress& progress) {
  int64_t num_sequences = 0, num_documents = 0;
  for (const Input& input : inputs) {
    num_sequences += input.num_sequences;
    num_documents += input.num_documents;
  }
  const auto header = IndexView::Header(inputs.front().token_type, num_sequences, num_documents);
  idx.Append(header.data(), header.size());
  for (const Input& input : inputs) {
    const IndexFile index = OpenAgain(input);
    const IndexView& view = index.view();
    AppendEntries<int32_t>(idx, index, view.lengths_offset(), input.num_sequences, progress,
                           [&view](int64_t i) { return view.Length(i); });
  }
  int64_t shift_bytes = 0;
  for (const Input& input : inputs) {
    const IndexFile index = OpenAgain(input);
    const IndexView& view = index.view();
    AppendEntries<int64_t>(idx, index, view.pointers_offset(), input.num_sequences, progress,
                           [&view, shift_bytes](int64_t i) { return view.Pointer(i) + shift_bytes; });
    shift_bytes += static_cast<int64_t>(input.bin_bytes);
  }
  int64_t shift_sequences = 0;
  for (const Input& input : inputs) {
    const IndexFile index = OpenAgain(input);
    const IndexView& view = index.view();
    // the last bound is the next shard's first
    AppendEntries<int64_t>(idx, index, view.bounds_offset(), input.num_documents, progress,
                           [&view, shift_sequences](int64_t i) { return view.Bound(i) + shift_sequences; });
    shift_sequences += input.num_sequences;
  }
  idx.Append(&shift_sequences, sizeof(shift_sequences));
}

}  // namespace

void MergeShards(const std::vector<std::string>& input_prefixes, const std::string& output_prefix,
                 const std::string& suffix, const Progress& progress) {
  if (input_prefixes.empty()) throw DataError("no shards were given to merge, expected at least one");
  std::vector<Input> inputs;
  for (const std::string& prefix : input_prefixes) {
    inputs.push_back(CheckInput(prefix, progress));
    const Input &first = inputs.front(), &last = inputs.back();
    if (last.token_type != first.token_type)
      throw DataError(prefix + ": holds " + TokenTypeName(last.token_type) + " tokens, expected " +
                      TokenTypeName(first.token_type) + " as in " + first.prefix +
                      ": shards of different token types cannot be merged");
  }
  OutputFile bin, idx;
  try {
    bin.Create(output_prefix + ".bin" + suffix);
    for (const Input& input : inputs) bin.AppendFile(input.prefix + ".bin", input.bin_bytes, progress);
    bin.Sync();
    idx.Create(output_prefix + ".idx" + suffix);
    WriteIndex(idx, inputs, progress);
    idx.Sync();
  } catch (...) {
    bin.Remove();
    idx.Remove();
    throw;
  }
}

}  // namespace illada
