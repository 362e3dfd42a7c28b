// The format and the products as nf4.h describes them, one value at a time in double precision. Nothing here is shared with the
// kernels but the table of code values; an f32 rounding stands where the format has one, as a cast to float.
#pragma once

#include <cmath>
#include <vector>

#include "../nf4.h"
#include "check.h"

namespace fourscore::test {

inline constexpr Float kTypes[3] = {Float::f32, Float::bf16, Float::f16};
inline const char* name_of(Float type) { return type == Float::f32 ? "f32" : type == Float::bf16 ? "bf16" : "f16"; }
inline i64 width(Float type) { return type == Float::f32 ? 4 : 2; }

struct Shape {
    int exponent, fraction;  // bits
};
inline Shape shape_of(Float type) { return type == Float::f32 ? Shape{8, 23} : type == Float::bf16 ? Shape{8, 7} : Shape{5, 10}; }

// The bits of a value rounded to nearest even, IEEE 754 with subnormals.
inline u32 encode(double v, Float type) {
    auto [exponent, fraction] = shape_of(type);
    const u32 infinity = ((1u << exponent) - 1) << fraction, sign = std::signbit(v) ? 1u << (exponent + fraction) : 0;
    if (std::isnan(v)) return infinity | 1u << (fraction - 1);
    double a = std::fabs(v);
    if (a == 0) return sign;
    const int least = 2 - (1 << (exponent - 1));  // exponent of the smallest normal value
    if (a >= std::ldexp(1.0, 2 - least)) return sign | infinity;
    int e = std::ilogb(a) > least ? std::ilogb(a) : least;
    u32 bits = (static_cast<u32>(e - least) << fraction) + static_cast<u32>(std::nearbyint(std::ldexp(a, fraction - e)));
    return sign | (bits < infinity ? bits : infinity);
}

inline double decode(u32 bits, Float type) {
    auto [exponent, fraction] = shape_of(type);
    u32 e = bits >> fraction & ((1u << exponent) - 1), f = bits & ((1u << fraction) - 1);
    double sign = bits >> (exponent + fraction) ? -1 : 1;
    if (e == (1u << exponent) - 1) return f ? NAN : sign * INFINITY;
    const int least = 2 - (1 << (exponent - 1));
    return sign * (e ? std::ldexp((1u << fraction) + f, least + static_cast<int>(e) - 1 - fraction) : std::ldexp(f, least - fraction));
}

inline double rounded(double v, Float type) { return decode(encode(v, type), type); }
// Half the distance of neighbouring values around v.
inline double half_ulp(double v, Float type) {
    auto [exponent, fraction] = shape_of(type);
    const int least = 2 - (1 << (exponent - 1)), e = v == 0 || std::ilogb(v) < least ? least : std::ilogb(v);
    return std::ldexp(0.5, e - fraction);
}

inline double get(const void* p, i64 i, Float type) {
    u32 bits = 0;
    std::memcpy(&bits, static_cast<const u8*>(p) + i * width(type), static_cast<std::size_t>(width(type)));
    return decode(bits, type);
}
inline void put(void* p, i64 i, Float type, double v) {
    u32 bits = encode(v, type);
    std::memcpy(static_cast<u8*>(p) + i * width(type), &bits, static_cast<std::size_t>(width(type)));
}

inline int code_at(const u8* packed, i64 flat) { return flat % 2 ? packed[flat / 2] & 15 : packed[flat / 2] >> 4; }

inline float scale_at(const Weight& w, i64 block) {
    if (w.scales) return w.scales[block];
    double product = static_cast<float>(double{w.nested_code[w.codes[block]]} * w.nested_absmax[block / w.nested_block]);
    return static_cast<float>(product + w.nested_offset);
}

// A weight as a number, before it is rounded to 16 bits: one f32 product.
inline double value_at(const Weight& w, i64 flat) {
    return static_cast<float>(double{kValues[code_at(w.packed, flat)]} * scale_at(w, flat / w.block));
}

// The whole weight, row-major, in `type`.
inline std::vector<double> dense(const Weight& w, Float type) {
    std::vector<double> values(static_cast<std::size_t>(w.rows * w.cols));
    for (i64 i = 0; i < w.rows * w.cols; ++i) values[static_cast<std::size_t>(i)] = rounded(value_at(w, i), type);
    return values;
}

// A block is multiplied by the reciprocal of its absmax; a last block that is cut short is divided, keeps the floor as its
// absmax, and fills an odd byte with the code of zero. A value on a midpoint has the lower code.
inline void quantize(const std::vector<double>& v, i64 block, u8* packed, float* absmax) {
    i64 n = static_cast<i64>(v.size());
    for (i64 start = 0; start < n; start += block) {
        i64 end = start + block < n ? start + block : n;
        bool whole = end - start == block;
        double largest = 0;
        for (i64 i = start; i < end; ++i) largest = std::fmax(largest, std::fabs(v[static_cast<std::size_t>(i)]));
        double divisor = std::fmax(largest, double{kFloor});
        double inverse = static_cast<float>(1 / divisor);
        absmax[start / block] = static_cast<float>(whole ? largest : divisor);
        for (i64 i = start; i < end; ++i) {
            double x = v[static_cast<std::size_t>(i)];
            double scaled = static_cast<float>(whole ? x * inverse : x / divisor);
            int code = 0;
            for (float m : kMidpoint) code += scaled > m;
            u8& byte = packed[i / 2];
            byte = static_cast<u8>(i % 2 ? (byte & 0xf0) | code : code << 4 | 7);
        }
    }
}

}  // namespace fourscore::test
