// What a 4-bit format is.  lora_kernels/formats.py defines every format, and `define_format` brings it here when the module is
// loaded: no name of a format and no table of values is compiled in.  Included by files that are compiled with AVX flags:
// nothing but <cstdint> (csrc/cpu/kernels.h says why).
#pragma once
#include <cstdint>

namespace lora_kernels {

struct Format {
  alignas(64) float code[16];  // value of each 4-bit index
  float midpoints[15];         // between neighbouring values, ascending
  uint8_t order[16];           // the indices by ascending value: an element is written as order[midpoints below it]
  uint32_t blocksizes;         // those accepted, all powers of two: their sum
};

constexpr int64_t MIN_BLOCKSIZE = 32, MAX_BLOCKSIZE = 4096;  // that the kernels can compute with

// The format of that name; it stays where it is as long as the process lives.
// Throws std::invalid_argument that names the formats there are.
const Format& format_of(const char* name);

// code [16]; order [16]; blocksizes [n].  A name can be defined again with the same values only.
// Throws std::invalid_argument.
void define_format(const char* name, const float* code, const uint8_t* order, const int64_t* blocksizes, int n);

// Element 2i of the weight is the high nibble of byte i, element 2i + 1 the low one.
static inline int first_code(uint8_t byte) { return byte >> 4; }
static inline int second_code(uint8_t byte) { return byte & 15; }
static inline uint8_t pack_codes(int first, int second) { return static_cast<uint8_t>(first << 4 | second); }

}  // namespace lora_kernels
