// A vector of f32 as wide as the instruction set has it, by the compiler's vector types: the same source for all of them, with
// intrinsics where the plain form would be slow. Compiled anew for each (FOURSCORE_ISA).
#pragma once

#include "portable.h"

#ifdef FOURSCORE_X86
#include <immintrin.h>
#endif

namespace fourscore::FOURSCORE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr i64 kLanes = 16;
#elif defined(__AVX2__)
constexpr i64 kLanes = 8;
#else
constexpr i64 kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef u32 Bits __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef u16 Halves __attribute__((vector_size(2 * kLanes)));

static inline Vec all(float f) { return Vec{} + f; }
static inline Bits as_bits(Vec v) { return reinterpret_cast<Bits>(v); }
static inline Vec as_floats(Bits b) { return reinterpret_cast<Vec>(b); }

static inline Vec fma(Vec a, Vec b, Vec c) {  // a * b + c; rounded once where the machine can
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }  // b where a is NaN

static inline Vec widen(Halves h) { return as_floats(__builtin_convertvector(h, Bits) << 16); }

// To nearest even; NaN stays NaN.
static inline Halves narrow(Vec v) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(v));
#else
    Bits b = as_bits(v);
    Bits r = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    r = v == v ? r : (Bits{} + 0x7fc0u);
    return __builtin_convertvector(r, Halves);
#endif
}

template <Float T>
static inline Vec load(const void* p, i64 i) {
    if constexpr (T == Float::f32) {
        Vec v;
        std::memcpy(&v, static_cast<const char*>(p) + 4 * i, sizeof v);
        return v;
    } else {
        Halves h;
        std::memcpy(&h, static_cast<const char*>(p) + 2 * i, sizeof h);
        return widen(h);
    }
}
template <Float T>
static inline void store(void* p, i64 i, Vec v) {
    if constexpr (T == Float::f32) {
        std::memcpy(static_cast<char*>(p) + 4 * i, &v, sizeof v);
    } else {
        Halves h = narrow(v);
        std::memcpy(static_cast<char*>(p) + 2 * i, &h, sizeof h);
    }
}

// The first `count` lanes; the others are `rest`.
template <Float T>
static inline Vec load_some(const void* p, i64 i, i64 count, float rest = 0) {
    float lanes[kLanes];
    for (i64 k = 0; k < kLanes; ++k) lanes[k] = k < count ? load_one(p, i + k, T) : rest;
    return load<Float::f32>(lanes, 0);
}
template <Float T>
static inline void store_some(void* p, i64 i, i64 count, Vec v) {
    char whole[sizeof v];
    constexpr i64 bytes = T == Float::f32 ? 4 : 2;
    store<T>(whole, 0, v);
    std::memcpy(static_cast<char*>(p) + bytes * i, whole, static_cast<std::size_t>(bytes * count));
}

// Lanes added in halves, quarters, ...
static inline float add_up(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v);
#endif
    float lanes[kLanes];
    std::memcpy(lanes, &v, sizeof v);
    for (i64 half = kLanes / 2; half; half /= 2)
        for (i64 k = 0; k < half; ++k) lanes[k] += lanes[k + half];
    return lanes[0];
}
static inline float largest(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(v);
#endif
    float lanes[kLanes];
    std::memcpy(lanes, &v, sizeof v);
    for (i64 half = kLanes / 2; half; half /= 2)
        for (i64 k = 0; k < half; ++k) lanes[k] = lanes[k] > lanes[k + half] ? lanes[k] : lanes[k + half];
    return lanes[0];
}

// e^x to 3 units in the last place (tests measure 2 at most). Under -87.3 it is 0, over 88.7 infinity; NaN stays NaN. Taken apart as 2^n e^r with
// |r| <= log(2) / 2; the polynomial is off by 9.2e-8 at most (fitted to the relative error).
static inline Vec exponential(Vec x) {
    const Vec magic = all(12582912.0f), low = all(-87.33654f), high = all(88.72284f);  // adding 1.5 * 2^23 rounds to an integer
    Vec c = x < low ? low : x;
    c = c > high ? high : c;
    Vec shifted = fma(c, all(1.44269504f), magic);
    Vec n = shifted - magic;
    Vec r = fma(n, all(-0x1.62e400p-1f), c);  // log(2) in two parts, the first short enough for exact products
    r = fma(n, all(-0x1.7f7d1cp-20f), r);
    Vec p = fma(r, all(0x1.100926p-7f), all(0x1.57198ap-5f));
    p = fma(r, p, all(0x1.5557bep-3f));
    p = fma(r, p, all(0x1.fffe26p-2f));
    p = fma(r, p, all(1.0f));
    p = fma(r, p, all(1.0f));
#if defined(__AVX512F__)
    Vec y = _mm512_scalef_ps(p, n);
#else
    // 2^n in two factors: 2^128 is no f32.
    Ints whole = reinterpret_cast<Ints>(as_bits(shifted)) - 0x4b400000;
    Ints half = whole >> 1;
    Vec y = p * reinterpret_cast<Vec>((half + 127) << 23) * reinterpret_cast<Vec>((whole - half + 127) << 23);
#endif
    y = x < low ? Vec{} : y;
    y = x > high ? all(__builtin_inff()) : y;
    return x == x ? y : x;
}

// 1 / (1 + e^-x)
static inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exponential(-x)); }

// Calls body<T>() with the type as a constant.
template <class Body>
static inline void with_type(Float type, Body body) {
    if (type == Float::bf16)
        body.template operator()<Float::bf16>();
    else
        body.template operator()<Float::f32>();
}

// f(vector, first value) over n values, the last vector cut.
template <Float T, class Body>
static inline void each_vector(i64 n, const Body& body) {
    i64 i = 0;
    for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
    if (i < n) body(i, n - i);
}
template <Float T>
static inline Vec load_up_to(const void* p, i64 i, i64 count, float rest = 0) {
    return count == kLanes ? load<T>(p, i) : load_some<T>(p, i, count, rest);
}
template <Float T>
static inline void store_up_to(void* p, i64 i, i64 count, Vec v) {
    if (count == kLanes)
        store<T>(p, i, v);
    else
        store_some<T>(p, i, count, v);
}
template <Float T>
static inline Vec round_to(Vec v) {
    return T == Float::bf16 ? widen(narrow(v)) : v;
}

}  // namespace
}  // namespace fourscore::FOURSCORE_ISA
