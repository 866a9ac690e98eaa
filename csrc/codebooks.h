// The 4-bit codebooks and the order of two codes in a byte: the only place in C++ that holds them.
#pragma once
#include <cstdint>

namespace lora_kernels {

// Value of each 4-bit index: quantiles of the standard normal distribution (Dettmers et al. 2023, appendix E).
alignas(64) static constexpr float NF4[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// One sign, two exponent and one mantissa bit, scaled to [-1, 1].
alignas(64) static constexpr float FP4[16] = {
    0.0f / 12, 0.0625f / 12,  8.0f / 12,  12.0f / 12,  4.0f / 12,  6.0f / 12,  2.0f / 12,  3.0f / 12,
    0.0f / 12, -0.0625f / 12, -8.0f / 12, -12.0f / 12, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12,
};

// Element 2i of the weight is the high nibble of byte i, element 2i + 1 the low one.
static inline int first_code(uint8_t byte) { return byte >> 4; }
static inline int second_code(uint8_t byte) { return byte & 15; }
static inline uint8_t pack_codes(int first, int second) { return static_cast<uint8_t>(first << 4 | second); }

}  // namespace lora_kernels
