// Python's view of reading: numpy buffers of the caller's are filled, without the GIL.
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "errors.h"
#include "index_file.h"
#include "open_file.h"
#include "permutation.h"
#include "token_copy.h"
#include "token_reader.h"

namespace py = pybind11;

namespace illada {
namespace {

// What the loops over tokens need of an array.
constexpr int kPlain = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;

TokenType TypeOf(const std::string& name) {
  if (const auto type = TokenTypeOfName(name)) return *type;
  throw py::type_error("token type " + name + ", expected uint16, int16, int32 or int64");
}

std::vector<ShardTokens> Shards(const std::vector<std::string>& bin_paths, const std::vector<std::string>& dtypes,
                                const std::vector<int64_t>& num_tokens) {
  if (bin_paths.size() != dtypes.size() || bin_paths.size() != num_tokens.size())
    throw py::type_error("bin_paths, dtypes and num_tokens must have one entry for each shard");
  std::vector<ShardTokens> shards;
  shards.reserve(bin_paths.size());
  for (size_t i = 0; i < bin_paths.size(); ++i) shards.push_back({bin_paths[i], TypeOf(dtypes[i]), num_tokens[i]});
  return shards;
}

template <typename Out>
void ReadInto(TokenReader& reader, const Array<int64_t>& starts, py::array& out, int64_t vocab_size) {
  const int64_t* first = starts.data();
  const int64_t rows = out.shape(0), length = out.shape(1);
  Out* data = static_cast<Out*>(out.mutable_data());
  py::gil_scoped_release release;
  reader.Read(first, rows, length, vocab_size, data);
}

void Read(TokenReader& reader, const Array<int64_t>& starts, py::array& out, int64_t vocab_size) {
  if (starts.ndim() != 1 || out.ndim() != 2 || starts.shape(0) != out.shape(0))
    throw py::type_error("expected starts [rows] and out [rows, length]");
  if ((out.flags() & kPlain) != kPlain || !out.writeable())
    throw py::type_error("out must be C-contiguous, aligned and writeable");
  if (py::isinstance<py::array_t<int64_t>>(out))
    ReadInto<int64_t>(reader, starts, out, vocab_size);
  else if (py::isinstance<py::array_t<int32_t>>(out))
    ReadInto<int32_t>(reader, starts, out, vocab_size);
  else if (py::isinstance<py::array_t<uint16_t>>(out))
    ReadInto<uint16_t>(reader, starts, out, vocab_size);
  else
    throw py::type_error("out must be int64, int32 or uint16, found " + py::str(out.dtype()).cast<std::string>());
}

py::bytes ReadBytes(const OpenFile& file, uint64_t offset, size_t count) {
  py::bytes content(nullptr, count);
  auto* to = reinterpret_cast<std::byte*>(PyBytes_AS_STRING(content.ptr()));
  py::gil_scoped_release release;
  file.Read(offset, count, to);
  return content;
}

void CheckTokenIds(const py::array& tokens, int64_t vocab_size, const std::string& bin_path, int64_t offset) {
  if (tokens.ndim() != 1) throw py::type_error("tokens must be one-dimensional");
  const TokenType type = TypeOf(py::str(tokens.dtype()).cast<std::string>());
  const auto contiguous = py::array::ensure(tokens, kPlain);
  const auto* bytes = static_cast<const std::byte*>(contiguous.data());
  const int64_t count = contiguous.size();
  py::gil_scoped_release release;
  if (!TokensAreValid(type, bytes, count, vocab_size))
    ThrowAtInvalidToken(type, bytes, count, vocab_size, bin_path, offset);
}

py::tuple Document(const IndexFile& index, int64_t document) {
  if (document < 0 || document >= index.view().num_documents())
    throw py::index_error("document " + std::to_string(document) + " was asked for, it has " +
                          std::to_string(index.view().num_documents()));
  const TokenRange range = index.view().Document(document);
  return py::make_tuple(range.begin, range.end);
}

py::array_t<int64_t> DocumentLengths(const IndexFile& index, int64_t begin, int64_t end) {
  if (begin < 0 || begin > end || end > index.view().num_documents())
    throw py::index_error("documents " + std::to_string(begin) + " to " + std::to_string(end) +
                          " were asked for, it has " + std::to_string(index.view().num_documents()));
  py::array_t<int64_t> lengths(end - begin);
  int64_t* to = lengths.mutable_data();
  const py::gil_scoped_release release;
  for (int64_t i = begin; i < end; ++i) {
    const TokenRange range = index.view().Document(i);
    *to++ = range.end - range.begin;
  }
  return lengths;
}

py::array_t<int64_t> Permute(const Array<int64_t>& positions, int64_t n, uint64_t key,
                             const std::optional<Array<int64_t>>& out) {
  if (n < 1) throw py::value_error("n is " + std::to_string(n) + ", expected 1 to 2^63 - 1");
  Array<int64_t> result = out.value_or(Array<int64_t>());
  if (!out) result = Array<int64_t>(std::vector<py::ssize_t>(positions.shape(), positions.shape() + positions.ndim()));
  if (result.size() != positions.size()) throw py::type_error("out must have as many entries as the positions");
  const int64_t* from = positions.data();
  int64_t* to = result.mutable_data();
  const int64_t count = positions.size();
  py::gil_scoped_release release;
  const Permutation permutation(static_cast<uint64_t>(n) - 1, key);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t position = from[i];
    if (position < 0 || position >= n)
      throw std::out_of_range("index is " + std::to_string(position) +
                              ", expected 0 to n - 1 = " + std::to_string(n - 1));
    to[i] = static_cast<int64_t>(permutation(static_cast<uint64_t>(position)));
  }
  return result;
}

}  // namespace

void BindReading(py::module_& module) {
  py::class_<IndexFile>(module, "IndexFile")
      .def(py::init<const std::string&, const std::string&>(), py::arg("idx_path"), py::arg("bin_path"))
      .def_property_readonly("dtype", [](const IndexFile& index) { return TokenTypeName(index.view().token_type()); })
      .def_property_readonly("num_sequences", [](const IndexFile& index) { return index.view().num_sequences(); })
      .def_property_readonly("num_documents", [](const IndexFile& index) { return index.view().num_documents(); })
      .def_property_readonly("num_tokens", [](const IndexFile& index) { return index.view().num_tokens(); })
      .def("document", &Document, py::arg("index"))
      .def("document_lengths", &DocumentLengths, py::arg("begin"), py::arg("end"))
      .def("check", &IndexFile::Check, py::arg("begin"), py::arg("end"), py::call_guard<py::gil_scoped_release>());
  py::class_<OpenFile>(module, "OpenFile")
      .def(py::init<const std::string&>(), py::arg("path"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("size_bytes", &OpenFile::size_bytes)
      .def("read", &ReadBytes, py::arg("offset"), py::arg("count"));
  module.def("open_files_limit", &OpenFiles::Limit);
  py::class_<TokenReader>(module, "TokenReader")
      .def(py::init([](const std::vector<std::string>& bin_paths, const std::vector<std::string>& dtypes,
                       const std::vector<int64_t>& num_tokens) {
             return std::make_unique<TokenReader>(Shards(bin_paths, dtypes, num_tokens));
           }),
           py::arg("bin_paths"), py::arg("dtypes"), py::arg("num_tokens"))
      .def_property_readonly("num_tokens", &TokenReader::num_tokens)
      .def_property_readonly("num_shards", &TokenReader::num_shards)
      .def_property_readonly("mapped", &TokenReader::mapped)
      .def("read", &Read, py::arg("starts"), py::arg("out").noconvert(), py::arg("vocab_size"));
  module.def("check_token_ids", &CheckTokenIds, py::arg("tokens"), py::arg("vocab_size"), py::arg("bin_path"),
             py::arg("offset"));
  module.def("permute", &Permute, py::arg("positions"), py::arg("n"), py::arg("key"),
             py::arg("out").noconvert() = py::none());
  module.def(
      "permute_one", [](uint64_t index, uint64_t last, uint64_t key) { return Permutation(last, key)(index); },
      py::arg("index"), py::arg("last"), py::arg("key"));
}

}  // namespace illada
