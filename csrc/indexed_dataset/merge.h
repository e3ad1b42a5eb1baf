// Concatenates shards.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace illada {

// Writes OUTPUT_PREFIX.bin and OUTPUT_PREFIX.idx: the documents of all inputs in their order, with their sequences.
// Tokens are copied by the kernel where it can. Memory stays bounded whatever the number of documents. The indexes of
// all inputs are checked entirely before anything is written; tokens are not looked at. As with the builder, the files
// get their names once they are on the device, and a shard of that name is replaced then.
//
// `progress` is called with the number of bytes of .bin copied since its last call (0 while indexes are passed); what
// it throws ends the merge, and like every other failure leaves nothing behind and the older shard as it was.
//
// Throws DataError for no inputs, missing or damaged ones, different token types, an output that is one of the inputs,
// and DiskError.
void MergeShards(const std::vector<std::string>& input_prefixes, const std::string& output_prefix,
                 const std::function<void(uint64_t)>& progress);

}  // namespace illada
