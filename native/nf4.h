// What the kernels share: the weight as it lies in memory, the code values, and one table of functions a backend.
#pragma once

#include <cstdint>
#include <vector>

namespace fourscore {

enum class Float : int { f32 = 0, bf16 = 1, f16 = 2 };

// A weight [rows, cols]: two codes a byte along the flattened matrix, the first in the high nibble. A scale covers `block`
// codes: scales[b], or, double-quantised, nested_code[codes[b]] * nested_absmax[b / nested_block] + nested_offset.
struct Weight {
    const std::uint8_t* packed;
    std::int64_t rows, cols, block;
    const float* scales;
    const std::uint8_t* codes;
    const float* nested_code;
    const float* nested_absmax;
    float nested_offset;
    std::int64_t nested_block;
};

// arXiv 2305.14314, appendix E.
inline constexpr float kValues[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                                      -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                                      0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                                      0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// A value above midpoint i and not above midpoint i + 1 has code i + 1; the sums round as torch's do.
inline constexpr float kMidpoint[15] = {
    (kValues[0] + kValues[1]) / 2,   (kValues[1] + kValues[2]) / 2,   (kValues[2] + kValues[3]) / 2,
    (kValues[3] + kValues[4]) / 2,   (kValues[4] + kValues[5]) / 2,   (kValues[5] + kValues[6]) / 2,
    (kValues[6] + kValues[7]) / 2,   (kValues[7] + kValues[8]) / 2,   (kValues[8] + kValues[9]) / 2,
    (kValues[9] + kValues[10]) / 2,  (kValues[10] + kValues[11]) / 2, (kValues[11] + kValues[12]) / 2,
    (kValues[12] + kValues[13]) / 2, (kValues[13] + kValues[14]) / 2, (kValues[14] + kValues[15]) / 2};

// bitsandbytes' least divisor of a block.
inline constexpr float kFloor = 1e-38f;

struct Backend {
    const char* name;
    // n values -> codes and one absmax a block. Gives the index of a NaN or infinity (the first), or -1.
    std::int64_t (*quantize)(const void* source, Float type, std::int64_t n, std::int64_t block, std::uint8_t* packed,
                             float* absmax, int threads);
    // The whole weight, rounded once to `type`.
    void (*dequantize)(const Weight&, void* out, Float type, int threads);
    // y[m, rows] = x[m, cols] W^T + bias (f32, may be null); x and y of one type, rows contiguous, strides in elements.
    void (*forward)(const Weight&, const void* x, std::int64_t m, std::int64_t x_stride, Float type, const float* bias,
                    void* y, int threads);
    // dx[m, cols] = dy[m, rows] W.
    void (*backward)(const Weight&, const void* dy, std::int64_t m, std::int64_t dy_stride, Float type, void* dx,
                     int threads);
};

extern const Backend kScalar;
#ifdef FOURSCORE_X86
extern const Backend kAvx2;
extern const Backend kAvx512;
extern const Backend kAvx512Bf16;
#endif
#ifdef FOURSCORE_ARM64
extern const Backend kNeon;
#endif

// Those this machine runs, best first.
std::vector<const Backend*> backends();

// n scales (less their mean) -> 8-bit codes of a sorted table of 256 values and one absmax a block, as bitsandbytes finds them:
// a value in [-1, 1] is rounded to one of 65,536 steps, and each step has the code of the nearest value.
void nested_quantize(const float* values, std::int64_t n, const float* table, std::int64_t block, std::uint8_t* codes, float* absmax);

}  // namespace fourscore
