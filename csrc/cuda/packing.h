// Packed weights on a GPU.  All pointers are device memory; kernels are queued on `stream`; see cpu/packing.h and cpu/dequantize.h.
#pragma once
#include "cpu/dequantize.h"

namespace gptvq::cuda {

// Codes are of Spec::code_dtype; bits of one above the format's are ignored.
void pack_codes(const void* codes, std::uint8_t* idx, const Spec& spec, int device, std::uint64_t stream);
void unpack_codes(const std::uint8_t* idx, void* codes, const Spec& spec, int device, std::uint64_t stream);

// out [rows, cols] = round(float(cb) * float(gs) * scale), bit for bit as on the CPU.
void dequantize(const Packed& weight, void* out, OutType type, const Spec& spec, int device, std::uint64_t stream);

}  // namespace gptvq::cuda
