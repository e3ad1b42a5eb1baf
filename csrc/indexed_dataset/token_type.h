// The integer types a shard may store its token ids in, and their codes in an index.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

namespace illada {

// Values are Megatron's DType codes (megatron/core/datasets/indexed_dataset.py). Its other codes (8-bit, float) never
// hold token ids.
enum class TokenType : uint8_t { kInt16 = 3, kInt32 = 4, kInt64 = 5, kUint16 = 8 };

inline constexpr TokenType kTokenTypes[] = {TokenType::kInt16, TokenType::kInt32, TokenType::kInt64,
                                            TokenType::kUint16};

// Calls `function` with a value of the C++ type that `type` stands for.
template <typename Function>
decltype(auto) WithTokenType(TokenType type, Function&& function) {
  switch (type) {
    case TokenType::kInt16:
      return std::forward<Function>(function)(int16_t{});
    case TokenType::kInt32:
      return std::forward<Function>(function)(int32_t{});
    case TokenType::kInt64:
      return std::forward<Function>(function)(int64_t{});
    case TokenType::kUint16:
      break;
  }
  return std::forward<Function>(function)(uint16_t{});
}

inline int64_t TokenBytes(TokenType type) {
  return WithTokenType(type, [](auto token) { return static_cast<int64_t>(sizeof(token)); });
}

// numpy's name of the type.
inline const char* TokenTypeName(TokenType type) {
  switch (type) {
    case TokenType::kInt16:
      return "int16";
    case TokenType::kInt32:
      return "int32";
    case TokenType::kInt64:
      return "int64";
    case TokenType::kUint16:
      break;
  }
  return "uint16";
}

inline std::optional<TokenType> TokenTypeOfCode(uint8_t code) {
  for (const TokenType type : kTokenTypes)
    if (static_cast<uint8_t>(type) == code) return type;
  return std::nullopt;
}

inline std::optional<TokenType> TokenTypeOfName(const std::string& name) {
  for (const TokenType type : kTokenTypes)
    if (name == TokenTypeName(type)) return type;
  return std::nullopt;
}

}  // namespace illada
