#include "permutation.h"

#include <algorithm>

namespace illada {
namespace {

constexpr uint64_t kGoldenRatio = 0x9E3779B97F4A7C15;  // 2^64 / golden ratio

// The finalizer of SplitMix64.
inline uint64_t Mix64(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
  return value ^ (value >> 31);
}

int BitLength(uint64_t value) { return value == 0 ? 0 : 64 - __builtin_clzll(value); }

}  // namespace

Permutation::Permutation(uint64_t last, uint64_t key) : last_(last) {
  const int bits = std::max(2, BitLength(last));
  low_bits_ = bits / 2;
  high_bits_ = bits - low_bits_;
  for (int i = 0; i < kRounds; ++i) round_keys_[i] = Mix64(key + static_cast<uint64_t>(i + 1) * kGoldenRatio);
}

// The halves take turns, each changed by exclusive-or with the top bits of a hash of the other.
uint64_t Permutation::Feistel(uint64_t value) const {
  uint64_t low = value & ((uint64_t{1} << low_bits_) - 1);
  uint64_t high = value >> low_bits_;
  for (int i = 0; i < kRounds; i += 2) {
    low ^= Mix64(high ^ round_keys_[i]) >> (64 - low_bits_);
    high ^= Mix64(low ^ round_keys_[i + 1]) >> (64 - high_bits_);
  }
  return high << low_bits_ | low;
}

}  // namespace illada
