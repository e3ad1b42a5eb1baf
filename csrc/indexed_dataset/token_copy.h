// The loop that every token passes: copied, converted and compared with the vocabulary in one go.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "token_type.h"

namespace illada {

// Copies tokens[0, count), stored as `type`, to out[0, count); Out is uint16_t, int32_t or int64_t. Returns whether all
// of them lie in [0, vocab_size); if not, what was written is of no use. Ids below vocab_size must fit in Out.
template <typename Out>
bool CopyTokens(TokenType type, const std::byte* tokens, int64_t count, int64_t vocab_size, Out* out);

// Whether tokens[0, count) all lie in [0, vocab_size).
bool TokensAreValid(TokenType type, const std::byte* tokens, int64_t count, int64_t vocab_size);

// The DataError for the first of tokens[0, count), which begin at token `offset` of `bin_path`, outside [0,
// vocab_size). Returns when there is none.
void ThrowAtInvalidToken(TokenType type, const std::byte* tokens, int64_t count, int64_t vocab_size,
                         const std::string& bin_path, int64_t offset);

}  // namespace illada
