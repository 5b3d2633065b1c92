#pragma once
#include "common/tensor.h"

namespace gptvq {

// codes of Format::Code [rows, vectors] -> idx u8 [tiles, blocks, block_bytes]; padding rows and columns hold code 0.
// Throws std::invalid_argument where a code is not below 2**code_bits.
void pack_codes(const void* codes, std::uint8_t* idx, const Spec& spec);

// Inverse of pack_codes.
void unpack_codes(const std::uint8_t* idx, void* codes, const Spec& spec);

}  // namespace gptvq
