#include "index_file.h"

#include <algorithm>
#include <stdexcept>

namespace illada {

void IndexFile::Check(int64_t begin, int64_t end) const {
  if (begin < 0) throw std::out_of_range("entry " + std::to_string(begin) + " of an index, expected 0 or more");
  const auto offset = [](uint64_t first, uint64_t entry_bytes, int64_t entry) {
    return first + entry_bytes * static_cast<uint64_t>(entry);
  };
  if (const int64_t last = std::min(end, view_.num_sequences()); begin < last) {
    view_.CheckSequences(begin, last);
    file_.Forget(offset(view_.lengths_offset(), 4, begin), offset(view_.lengths_offset(), 4, last));
    file_.Forget(offset(view_.pointers_offset(), 8, begin), offset(view_.pointers_offset(), 8, last));
  }
  if (const int64_t last = std::min(end, view_.num_documents()); begin < last) {
    view_.CheckDocuments(begin, last);
    file_.Forget(offset(view_.bounds_offset(), 8, begin), offset(view_.bounds_offset(), 8, last));
  }
}

}  // namespace illada
