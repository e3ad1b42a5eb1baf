// An index on disk, mapped.
#pragma once

#include <string>

#include "index_view.h"
#include "mapped_file.h"

namespace illada {

class IndexFile {
 public:
  // Maps `idx_path` and checks it against the size of `bin_path` in constant time, see IndexView.
  IndexFile(const std::string& idx_path, const std::string& bin_path)
      : file_(idx_path), view_(file_.data(), file_.size_bytes(), FileBytes(bin_path), idx_path, bin_path) {}

  const IndexView& view() const { return view_; }

  // The full pass, a piece at a time: the pages of a piece are let go of, so memory stays bounded. Entries [begin,
  // end) of max(num_sequences, num_documents); the last piece may end beyond both.
  void Check(int64_t begin, int64_t end) const;

  // Lets go of the pages that hold entries [begin, end) of an array of `entry_bytes` each that lies at `offset`.
  void Forget(uint64_t offset, uint64_t entry_bytes, int64_t begin, int64_t end) const {
    file_.Forget(offset + entry_bytes * static_cast<uint64_t>(begin),
                 offset + entry_bytes * static_cast<uint64_t>(end));
  }

 private:
  MappedFile file_;
  IndexView view_;
};

}  // namespace illada
