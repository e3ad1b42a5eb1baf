#include "builder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <utility>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "the format is little endian and written as it lies in memory");

namespace illada {
namespace {

// Large writes: a parallel file system serves megabytes at a time far better than pages.
constexpr size_t kBufferBytes = size_t{8} << 20;
constexpr size_t kTokensAtATime = size_t{1} << 16;
constexpr int64_t kUint16Vocabulary = 65536;
constexpr uint64_t kVersion = 1;
constexpr uint8_t kCodeInt32 = 4;
constexpr uint8_t kCodeUint16 = 8;

[[noreturn]] void ThrowDiskError(const std::string& path) { throw DiskError(errno, path); }

std::string TemporaryName(const std::string& path) { return path + ".tmp"; }

std::string DirectoryOf(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

// A rename survives a power failure only when its directory has reached the device as well.
void SyncDirectory(const std::string& directory) {
  const int descriptor = open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) ThrowDiskError(directory);
  const int result = fsync(descriptor);
  const int error_number = errno;
  close(descriptor);
  // some network file systems cannot flush a directory and say EINVAL; they order renames themselves
  if (result != 0 && error_number != EINVAL) throw DiskError(error_number, directory);
}

void Rename(const std::string& from, const std::string& to) {
  if (rename(from.c_str(), to.c_str()) != 0) ThrowDiskError(to);
}

void RemoveIfThere(const std::string& path) {
  if (unlink(path.c_str()) != 0 && errno != ENOENT) ThrowDiskError(path);
}

}  // namespace

void OutputFile::Open(const std::string& path) {
  path_ = path;
  descriptor_ = open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
  if (descriptor_ < 0) ThrowDiskError(path);
  const auto fail = [this](int error_number) {
    Close();
    throw DiskError(error_number, path_);
  };
  // file systems without locks answer ENOLCK, ENOSYS or EOPNOTSUPP: there only the names keep writers apart
  if (flock(descriptor_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) fail(EWOULDBLOCK);
  // between open and flock another writer may have finished and renamed the very file that is locked now
  struct stat held, named;
  if (fstat(descriptor_, &held) != 0) fail(errno);
  if (stat(path.c_str(), &named) != 0 || held.st_ino != named.st_ino || held.st_dev != named.st_dev) fail(EWOULDBLOCK);
  if (ftruncate(descriptor_, 0) != 0) fail(errno);
  buffer_.reserve(kBufferBytes);
}

void OutputFile::Append(const void* bytes, size_t count) {
  const char* from = static_cast<const char*>(bytes);
  while (count > 0) {
    const size_t fits = std::min(count, kBufferBytes - buffer_.size());
    buffer_.insert(buffer_.end(), from, from + fits);
    from += fits;
    count -= fits;
    if (buffer_.size() == kBufferBytes) Flush();
  }
}

void OutputFile::Flush() {
  const char* from = buffer_.data();
  size_t left = buffer_.size();
  while (left > 0) {
    const ssize_t written = write(descriptor_, from, left);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) ThrowDiskError(path_);
    from += written;
    left -= static_cast<size_t>(written);
  }
  buffer_.clear();
}

void OutputFile::Sync() {
  Flush();
  if (fsync(descriptor_) != 0) ThrowDiskError(path_);
}

void OutputFile::Close() noexcept {
  if (descriptor_ >= 0) close(descriptor_);
  descriptor_ = -1;
  buffer_ = {};
}

IndexedDatasetBuilder::IndexedDatasetBuilder(std::string prefix, int64_t vocab_size)
    : prefix_(std::move(prefix)),
      vocab_size_(vocab_size),
      wide_(vocab_size > kUint16Vocabulary),
      owner_process_(getpid()) {
  if (vocab_size < 1 || vocab_size - 1 > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("vocab_size is " + std::to_string(vocab_size) + ", expected 1 to 2147483648");
  bin_.Open(TemporaryName(prefix_ + ".bin"));
}

IndexedDatasetBuilder::~IndexedDatasetBuilder() { Abort(); }

void IndexedDatasetBuilder::RequireOpen() const {
  if (state_ == State::kOpen) return;
  throw std::invalid_argument(prefix_ + ": the writer was already " +
                              (state_ == State::kFinished ? "finished" : "aborted") + "; make a new one");
}

template <typename Token>
void IndexedDatasetBuilder::CheckBatch(const Token* tokens, int64_t num_tokens, const int64_t* lengths,
                                       int64_t num_documents) const {
  int64_t sum = 0;
  for (int64_t i = 0; i < num_documents; ++i) {
    if (lengths[i] < 0 || lengths[i] > std::numeric_limits<int32_t>::max())
      throw std::invalid_argument(prefix_ + ": document " + std::to_string(this->num_documents() + i) + " has length " +
                                  std::to_string(lengths[i]) + ", expected 0 to 2147483647 tokens");
    sum += lengths[i];
  }
  if (sum != num_tokens)
    throw std::invalid_argument(prefix_ + ": the document lengths add up to " + std::to_string(sum) + " but " +
                                std::to_string(num_tokens) + " tokens were given");
  const auto bad = std::find_if(tokens, tokens + num_tokens, [this](Token token) {
    return static_cast<int64_t>(token) < 0 || static_cast<int64_t>(token) >= vocab_size_;
  });
  if (bad == tokens + num_tokens) return;
  const int64_t position = bad - tokens;
  int64_t document = 0;
  for (int64_t end = lengths[0]; end <= position; end += lengths[document]) ++document;
  throw std::invalid_argument(prefix_ + ": token id " + std::to_string(static_cast<int64_t>(*bad)) +
                              " at token offset " + std::to_string(num_tokens_ + position) + " (document " +
                              std::to_string(this->num_documents() + document) + ") is not in the vocabulary of size " +
                              std::to_string(vocab_size_) +
                              ": write with the vocab_size of the tokenizer that made these ids");
}

template <typename Stored, typename Token>
void IndexedDatasetBuilder::AppendTokens(const Token* tokens, int64_t num_tokens) {
  std::vector<Stored> block;
  for (int64_t start = 0; start < num_tokens; start += kTokensAtATime) {
    const int64_t end = std::min(num_tokens, start + static_cast<int64_t>(kTokensAtATime));
    block.clear();
    std::transform(tokens + start, tokens + end, std::back_inserter(block),
                   [](Token token) { return static_cast<Stored>(token); });
    bin_.Append(block.data(), block.size() * sizeof(Stored));
  }
}

template <typename Token>
void IndexedDatasetBuilder::Add(const Token* tokens, int64_t num_tokens, const int64_t* lengths,
                                int64_t num_documents) {
  RequireOpen();
  CheckBatch(tokens, num_tokens, lengths, num_documents);
  try {
    if (wide_)
      AppendTokens<int32_t>(tokens, num_tokens);
    else
      AppendTokens<uint16_t>(tokens, num_tokens);
    std::transform(lengths, lengths + num_documents, std::back_inserter(lengths_),
                   [](int64_t length) { return static_cast<int32_t>(length); });
  } catch (...) {
    // half a batch may have reached the file: it must never get an index
    Abort();
    throw;
  }
  num_tokens_ += num_tokens;
}

template void IndexedDatasetBuilder::Add(const uint16_t*, int64_t, const int64_t*, int64_t);
template void IndexedDatasetBuilder::Add(const int32_t*, int64_t, const int64_t*, int64_t);
template void IndexedDatasetBuilder::Add(const int64_t*, int64_t, const int64_t*, int64_t);

void IndexedDatasetBuilder::Finalize() {
  RequireOpen();
  try {
    if (num_tokens_ == 0)
      throw std::invalid_argument(prefix_ + ": no tokens were added; an empty shard is not written");
    bin_.Sync();
    idx_.Open(TemporaryName(prefix_ + ".idx"));
    WriteIndex();
    idx_.Sync();
    Publish();
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
  const uint64_t count = lengths_.size();
  const int64_t token_bytes = wide_ ? sizeof(int32_t) : sizeof(uint16_t);
  idx_.Append("MMIDIDX\0\0", 9);
  append_value(kVersion);
  append_value(wide_ ? kCodeInt32 : kCodeUint16);
  append_value(count);
  append_value(count + 1);
  idx_.Append(lengths_.data(), count * sizeof(int32_t));
  int64_t offset_bytes = 0;
  for (const int32_t length : lengths_) {
    append_value(offset_bytes);
    offset_bytes += length * token_bytes;
  }
  for (int64_t bound = 0; bound <= static_cast<int64_t>(count); ++bound) append_value(bound);
}

void IndexedDatasetBuilder::Publish() {
  const std::string bin = prefix_ + ".bin", idx = prefix_ + ".idx", directory = DirectoryOf(prefix_);
  // an older index must be gone for good before its .bin changes under it
  RemoveIfThere(idx);
  SyncDirectory(directory);
  Rename(TemporaryName(bin), bin);
  SyncDirectory(directory);
  Rename(TemporaryName(idx), idx);
  SyncDirectory(directory);
}

void IndexedDatasetBuilder::Abort() noexcept {
  // a forked child that inherited this object must not remove its parent's files
  if (state_ != State::kOpen || getpid() != owner_process_) return;
  state_ = State::kAborted;
  unlink(TemporaryName(prefix_ + ".bin").c_str());
  unlink(TemporaryName(prefix_ + ".idx").c_str());
  bin_.Close();
  idx_.Close();
}

}  // namespace illada
