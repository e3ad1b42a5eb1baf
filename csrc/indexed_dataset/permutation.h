// The order of an epoch, for one position at a time; what it computes is explained in
// illada_megatron/data/corpus/order.py.
#pragma once

#include <array>
#include <cstdint>

namespace illada {

// A keyed bijection on [0, last]: a Feistel network on the smallest power of two that holds it, with cycle walking.
class Permutation {
 public:
  Permutation(uint64_t last, uint64_t key);

  // index in [0, last].
  uint64_t operator()(uint64_t index) const {
    if (last_ == 0) return 0;
    uint64_t value = Feistel(index);
    while (value > last_) value = Feistel(value);
    return value;
  }

 private:
  // each round changes one half; tiny domains mix slowly, so the number is generous
  static constexpr int kRounds = 12;

  uint64_t Feistel(uint64_t value) const;

  uint64_t last_;
  int low_bits_;
  int high_bits_;
  std::array<uint64_t, kRounds> round_keys_;
};

}  // namespace illada
