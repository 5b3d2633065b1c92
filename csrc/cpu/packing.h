#pragma once
#include "common/tensor.h"

namespace gptvq {

// codes u8 [rows, vectors] -> idx u8 [tiles, blocks, block_bytes]; padding rows and columns hold code 0.
// Throws std::invalid_argument where a code is not below 2**code_bits.
void pack_codes(const std::uint8_t* codes, std::uint8_t* idx, const Spec& spec);

// Inverse of pack_codes.
void unpack_codes(const std::uint8_t* idx, std::uint8_t* codes, const Spec& spec);

}  // namespace gptvq
