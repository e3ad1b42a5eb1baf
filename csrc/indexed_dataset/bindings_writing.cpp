// Python's view of writing: numpy arrays in, exceptions out, no GIL while checking and writing.
#include <pybind11/stl.h>

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "builder.h"
#include "merge.h"

namespace py = pybind11;

namespace illada {
namespace {

// Without the GIL two Python threads may call at once: one mutex a builder puts them in a row.
class Builder {
 public:
  Builder(std::string prefix, std::string suffix, int64_t vocab_size)
      : builder_(std::move(prefix), std::move(suffix), vocab_size) {}

  void Add(const py::array& tokens, const Array<int64_t>& lengths, std::optional<int64_t> end_token) {
    if (tokens.ndim() != 1 || lengths.ndim() != 1) throw py::type_error("tokens and lengths must be one-dimensional");
    if (py::isinstance<py::array_t<uint16_t>>(tokens))
      AddTyped<uint16_t>(tokens, lengths, end_token);
    else if (py::isinstance<py::array_t<int32_t>>(tokens))
      AddTyped<int32_t>(tokens, lengths, end_token);
    else if (py::isinstance<py::array_t<int64_t>>(tokens))
      AddTyped<int64_t>(tokens, lengths, end_token);
    else
      throw py::type_error("tokens must be uint16, int32 or int64, found " +
                           py::str(tokens.dtype()).cast<std::string>());
  }

  void Finalize() {
    py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    builder_.Finalize();
  }

  void Abort() {
    py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    builder_.Abort();
  }

  int64_t num_tokens() const { return builder_.num_tokens(); }
  int64_t num_documents() const { return builder_.num_documents(); }
  std::string dtype() const { return builder_.wide() ? "int32" : "uint16"; }

 private:
  template <typename Token>
  void AddTyped(const py::array& tokens, const Array<int64_t>& lengths, std::optional<int64_t> end_token) {
    const auto contiguous = Array<Token>::ensure(tokens);
    const Token* data = contiguous.data();
    const int64_t num_tokens = contiguous.size(), num_documents = lengths.size();
    const int64_t* length_data = lengths.data();
    py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    builder_.Add(data, num_tokens, length_data, num_documents, end_token.value_or(IndexedDatasetBuilder::kNoEndToken));
  }

  std::mutex mutex_;
  IndexedDatasetBuilder builder_;
};

// Called from C++ without the GIL; Python code runs in between, so Ctrl-C ends the merge.
void Merge(const std::vector<std::string>& input_prefixes, const std::string& output_prefix, const std::string& suffix,
           const py::object& progress) {
  const auto report = [&progress](uint64_t count) {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress.is_none()) progress(count);
  };
  const py::gil_scoped_release release;
  MergeShards(input_prefixes, output_prefix, suffix, report);
}

}  // namespace

void BindWriting(py::module_& module) {
  py::class_<Builder>(module, "IndexedDatasetBuilder")
      .def(py::init<std::string, std::string, int64_t>(), py::arg("prefix"), py::arg("suffix"), py::arg("vocab_size"))
      .def("add", &Builder::Add, py::arg("tokens"), py::arg("lengths"), py::arg("end_token") = py::none())
      .def("finalize", &Builder::Finalize)
      .def("abort", &Builder::Abort)
      .def_property_readonly("num_tokens", &Builder::num_tokens)
      .def_property_readonly("num_documents", &Builder::num_documents)
      .def_property_readonly("dtype", &Builder::dtype);
  module.def("merge_shards", &Merge, py::arg("input_prefixes"), py::arg("output_prefix"), py::arg("suffix"),
             py::arg("progress") = py::none());
}

}  // namespace illada
