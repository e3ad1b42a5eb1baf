// What can go wrong with a shard. Python sees OSError and illada_megatron.data.DataError.
#pragma once

#include <cerrno>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

namespace illada {

// What to do about a damaged shard; the end of many messages.
inline constexpr char kRewrite[] = "write the shard again (illada preprocess), or copy both of its files again";

// A failed system call on `path`.
class DiskError : public std::system_error {
 public:
  DiskError(int error_number, std::string path)
      : std::system_error(error_number, std::generic_category(), path), path_(std::move(path)) {}
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// The system call's result; it is made again where a signal interrupted it (EINTR), as one does that checkpoints or a
// profiler's timer send while a file server is slow.
template <typename Call>
int Uninterrupted(const Call& call) {
  int result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

// Files or values that cannot be used; the message names the file, what was found and what was expected.
class DataError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace illada
