// How the drivers of tests/simt answer Python (harness.py): nullptr, or what went wrong.
#pragma once

#include <exception>
#include <string>

namespace simt {

template <typename Call>
const char* message_of(const Call& call) {
  static std::string message;
  try {
    message = call();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.empty() ? nullptr : message.c_str();
}

}  // namespace simt
