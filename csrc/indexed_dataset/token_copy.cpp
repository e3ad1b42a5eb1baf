#include "token_copy.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "errors.h"

// The compiler makes a version for each instruction set and the loader picks one; elsewhere than on x86-64 Linux the
// baseline has to do (aarch64's includes 128-bit vectors).
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
#define ILLADA_VECTOR_VERSIONS __attribute__((target_clones("avx2", "default")))
#else
#define ILLADA_VECTOR_VERSIONS
#endif
#define ILLADA_ALWAYS_INLINE inline __attribute__((always_inline))

namespace illada {
namespace {

// The processor fetches ahead of a loop by itself, but not across a page's end, and a window is a few pages: asking for
// the next page in time makes the loop faster than memcpy.
constexpr int64_t kBlockBytes = 1024;
constexpr int64_t kAheadBytes = 4096;
constexpr int64_t kLineBytes = 64;

// Read as unsigned numbers, negative ids are above every vocabulary: one running maximum sees both ends.
template <typename Stored, typename Out>
ILLADA_ALWAYS_INLINE std::make_unsigned_t<Stored> CopyAndMax(const Stored* __restrict in, int64_t count,
                                                             Out* __restrict out) {
  constexpr int64_t kBlock = kBlockBytes / sizeof(Stored), kAhead = kAheadBytes / sizeof(Stored);
  std::make_unsigned_t<Stored> largest = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    if (begin + kAhead + kBlock <= count)
      for (int64_t i = 0; i < kBlock; i += kLineBytes / sizeof(Stored)) __builtin_prefetch(in + begin + kAhead + i);
    const int64_t end = std::min(count, begin + kBlock);
    for (int64_t i = begin; i < end; ++i) {
      const auto id = static_cast<std::make_unsigned_t<Stored>>(in[i]);
      largest = id > largest ? id : largest;
      out[i] = static_cast<Out>(in[i]);
    }
  }
  return largest;
}

template <typename Stored>
ILLADA_ALWAYS_INLINE std::make_unsigned_t<Stored> Max(const Stored* in, int64_t count) {
  std::make_unsigned_t<Stored> largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto id = static_cast<std::make_unsigned_t<Stored>>(in[i]);
    largest = id > largest ? id : largest;
  }
  return largest;
}

// target_clones does not go with templates: a plain overload for each pair of types around the inlined template.
#define ILLADA_COPY(Stored, Out)                                                                        \
  ILLADA_VECTOR_VERSIONS std::make_unsigned_t<Stored> Copy(const Stored* in, int64_t count, Out* out) { \
    return CopyAndMax<Stored, Out>(in, count, out);                                                     \
  }
#define ILLADA_KERNELS(Stored)                                                                   \
  ILLADA_COPY(Stored, uint16_t)                                                                  \
  ILLADA_COPY(Stored, int32_t)                                                                   \
  ILLADA_COPY(Stored, int64_t)                                                                   \
  ILLADA_VECTOR_VERSIONS std::make_unsigned_t<Stored> Largest(const Stored* in, int64_t count) { \
    return Max<Stored>(in, count);                                                               \
  }

ILLADA_KERNELS(int16_t)
ILLADA_KERNELS(int32_t)
ILLADA_KERNELS(int64_t)
ILLADA_KERNELS(uint16_t)

// Whether ids of type `Stored` whose largest, read as an unsigned number, is `largest` all lie in [0, vocab_size). A
// negative one is at least 2^(bits - 1), which a large vocabulary reaches and the type does not.
template <typename Stored>
bool InVocabulary(std::make_unsigned_t<Stored> largest, int64_t vocab_size) {
  return vocab_size > 0 && largest < static_cast<uint64_t>(vocab_size) &&
         largest <= static_cast<std::make_unsigned_t<Stored>>(std::numeric_limits<Stored>::max());
}

}  // namespace

template <typename Out>
bool CopyTokens(TokenType type, const std::byte* tokens, int64_t count, int64_t vocab_size, Out* out) {
  return WithTokenType(type, [&](auto token) {
    const auto* in = reinterpret_cast<const decltype(token)*>(tokens);
    return InVocabulary<decltype(token)>(Copy(in, count, out), vocab_size);
  });
}

template bool CopyTokens(TokenType, const std::byte*, int64_t, int64_t, uint16_t*);
template bool CopyTokens(TokenType, const std::byte*, int64_t, int64_t, int32_t*);
template bool CopyTokens(TokenType, const std::byte*, int64_t, int64_t, int64_t*);

bool TokensAreValid(TokenType type, const std::byte* tokens, int64_t count, int64_t vocab_size) {
  return WithTokenType(type, [&](auto token) {
    const auto* in = reinterpret_cast<const decltype(token)*>(tokens);
    return InVocabulary<decltype(token)>(Largest(in, count), vocab_size);
  });
}

void ThrowAtInvalidToken(TokenType type, const std::byte* tokens, int64_t count, int64_t vocab_size,
                         const std::string& bin_path, int64_t offset) {
  WithTokenType(type, [&](auto token) {
    const auto* in = reinterpret_cast<const decltype(token)*>(tokens);
    for (int64_t i = 0; i < count; ++i) {
      const auto id = static_cast<int64_t>(in[i]);
      if (id < 0 || id >= vocab_size)
        throw DataError(bin_path + ": token id " + std::to_string(id) + " at token offset " +
                        std::to_string(offset + i) + " is not in the vocabulary of size " + std::to_string(vocab_size) +
                        ": the shard was written with another tokenizer; set model.vocab_size to that tokenizer's "
                        "size or preprocess the text again");
    }
  });
}

}  // namespace illada
