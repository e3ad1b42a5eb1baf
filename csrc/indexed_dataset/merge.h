// Concatenates shards.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace illada {

// Writes OUTPUT_PREFIX.bin and .idx, each with `suffix` behind it: the documents of all inputs in their order, with
// their sequences. Their names as a shard are given by the caller, once this has flushed them to the device. Tokens are
// copied by the kernel where it can. Memory stays bounded whatever the number of documents. The indexes of all inputs
// are checked entirely before anything is written; tokens are not looked at.
//
// `progress` is called with the number of bytes of .bin copied since its last call (0 while indexes are passed); what
// it throws ends the merge, and like every other failure leaves nothing behind.
//
// Throws DataError for no inputs, missing or damaged ones, and different token types, and DiskError.
void MergeShards(const std::vector<std::string>& input_prefixes, const std::string& output_prefix,
                 const std::string& suffix, const std::function<void(uint64_t)>& progress);

}  // namespace illada
