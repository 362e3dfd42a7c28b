// The part of a backend that is the same for every instruction set, compiled anew (and renamed) for each of them: roundings,
// scales, and the codec one value at a time. Include inside no namespace, with FOURSCORE_ISA naming the backend's own.
#pragma once

#include <cstring>

#include "nf4.h"
#include "pool.h"

namespace fourscore::FOURSCORE_ISA {

using i64 = std::int64_t;
using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;

constexpr i64 kUnit = 64;  // weights decoded at a time; every layout below is made of units

static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 most(i64 a, i64 b) { return a > b ? a : b; }
static inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

static inline u32 bits_of(float f) {
    u32 b;
    std::memcpy(&b, &f, 4);
    return b;
}
static inline float float_of(u32 b) {
    float f;
    std::memcpy(&f, &b, 4);
    return f;
}

static inline float from_bf16(u16 h) { return float_of(u32{h} << 16); }
static inline u16 to_bf16(float f) {
    u32 b = bits_of(f);
#ifdef __AVX512BF16__
    // As the processor's own conversion, so that a weight's last few values are rounded like the others.
    if (!(b & 0x7f800000u)) return static_cast<u16>((b >> 16) & 0x8000u);
#endif
    if ((b & 0x7fffffffu) > 0x7f800000u) return static_cast<u16>((b >> 16) | 0x40);
    return static_cast<u16>((b + 0x7fffu + ((b >> 16) & 1)) >> 16);
}

static inline float from_f16(u16 h) {
    u32 sign = u32{h & 0x8000u} << 16, rest = h & 0x7fffu;
    if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
    if (rest >= 0x400u) return float_of(sign | ((rest << 13) + (112u << 23)));
    float f = static_cast<float>(rest) * 0x1p-24f;
    return float_of(sign | bits_of(f));
}
static inline u16 to_f16(float f) {
    u32 b = bits_of(f), sign = (b >> 16) & 0x8000u, rest = b & 0x7fffffffu;
    if (rest > 0x7f800000u) return static_cast<u16>(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return static_cast<u16>(sign | 0x7c00u);
    if (rest < 0x38800000u) {
        // Adding 0.5 puts the last bit of the half at the last bit of the float, and rounds to nearest even on the way.
        float shifted = float_of(rest) + 0.5f;
        return static_cast<u16>(sign | (bits_of(shifted) - bits_of(0.5f)));
    }
    u32 odd = (rest >> 13) & 1;
    return static_cast<u16>(sign | ((rest - (112u << 23) + 0xfffu + odd) >> 13));
}

static inline float rounded(float f, Float type) {
    if (type == Float::bf16) return from_bf16(to_bf16(f));
    if (type == Float::f16) return from_f16(to_f16(f));
    return f;
}

// Through memcpy: the bytes may have been written as another type.
static inline float load_one(const void* p, i64 i, Float type) {
    if (type == Float::f32) {
        float f;
        std::memcpy(&f, static_cast<const char*>(p) + 4 * i, 4);
        return f;
    }
    u16 h;
    std::memcpy(&h, static_cast<const char*>(p) + 2 * i, 2);
    return type == Float::bf16 ? from_bf16(h) : from_f16(h);
}
static inline void store_one(void* p, i64 i, Float type, float f) {
    if (type == Float::f32) {
        std::memcpy(static_cast<char*>(p) + 4 * i, &f, 4);
    } else {
        u16 h = type == Float::bf16 ? to_bf16(f) : to_f16(f);
        std::memcpy(static_cast<char*>(p) + 2 * i, &h, 2);
    }
}
static inline i64 width(Float type) { return type == Float::f32 ? 4 : 2; }
static inline const void* at(const void* p, i64 i, Float type) { return static_cast<const char*>(p) + i * width(type); }
static inline void* at(void* p, i64 i, Float type) { return static_cast<char*>(p) + i * width(type); }

// Product and sum are rounded one by one, as bitsandbytes does; the build forbids fusing them.
static inline float scale_of(const Weight& w, i64 block) {
    if (w.scales) return w.scales[block];
    return w.nested_code[w.codes[block]] * w.nested_absmax[block / w.nested_block] + w.nested_offset;
}

static inline float value_at(const Weight& w, i64 flat) {
    u8 byte = w.packed[flat >> 1];
    return kValues[flat & 1 ? byte & 15 : byte >> 4] * scale_of(w, flat / w.block);
}

// One unit of row `row` from column k, zeros beyond the row's end: any shape, any block size.
static inline void plain_unit(const Weight& w, i64 row, i64 k, Float round, float* out) {
    i64 count = least(kUnit, w.cols - k), flat = row * w.cols + k;
    i64 block = -1;
    float scale = 0;
    for (i64 i = 0; i < count; ++i) {
        if (i64 b = (flat + i) / w.block; b != block) block = b, scale = scale_of(w, b);
        u8 byte = w.packed[(flat + i) >> 1];
        out[i] = rounded(kValues[(flat + i) & 1 ? byte & 15 : byte >> 4] * scale, round);
    }
    for (i64 i = count; i < kUnit; ++i) out[i] = 0;
}

static inline u8 code_of(float v) {
    u8 code = 0;
    for (float m : kMidpoint) code = static_cast<u8>(code + (v > m));
    return code;
}

// A block that ends the weight early: divided, not multiplied by the reciprocal, and with the floor kept as its absmax.
static inline i64 quantize_tail(const void* source, Float type, i64 start, i64 count, u8* packed, float* absmax) {
    float most_ = 0;
    for (i64 i = 0; i < count; ++i) {
        float v = load_one(source, start + i, type);
        u32 magnitude = bits_of(v) & 0x7fffffffu;
        if (magnitude >= 0x7f800000u) return start + i;
        if (float_of(magnitude) > most_) most_ = float_of(magnitude);
    }
    if (most_ < kFloor) most_ = kFloor;
    *absmax = most_;
    for (i64 i = 0; i < count; i += 2) {
        u8 high = code_of(load_one(source, start + i, type) / most_);
        u8 low = i + 1 < count ? code_of(load_one(source, start + i + 1, type) / most_) : u8{7};
        packed[(start + i) >> 1] = static_cast<u8>(high << 4 | low);
    }
    return -1;
}

static inline i64 first_not_finite(const void* source, Float type, i64 start, i64 count) {
    for (i64 i = 0; i < count; ++i)
        if ((bits_of(load_one(source, start + i, type)) & 0x7fffffffu) >= 0x7f800000u) return start + i;
    return -1;
}

}  // namespace fourscore::FOURSCORE_ISA
