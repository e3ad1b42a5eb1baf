#include "index_file.h"

#include <algorithm>
#include <stdexcept>

namespace illada {

void IndexFile::Check(int64_t begin, int64_t end) const {
  if (begin < 0) throw std::out_of_range("entry " + std::to_string(begin) + " of an index, expected 0 or more");
  if (const int64_t last = std::min(end, view_.num_sequences()); begin < last) {
    view_.CheckSequences(begin, last);
    Forget(view_.lengths_offset(), 4, begin, last);
    Forget(view_.pointers_offset(), 8, begin, last);
  }
  if (const int64_t last = std::min(end, view_.num_documents()); begin < last) {
    view_.CheckDocuments(begin, last);
    Forget(view_.bounds_offset(), 8, begin, last);
  }
}

}  // namespace illada
