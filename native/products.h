// What a product's innermost loop is made of: one value a step in f32, or, with bf16 dot products, two values a step. An operand
// B holds a step's values side by side, a column a lane, and so must A, whose values are spread over the lanes.
#pragma once

#include "vec.h"

namespace fourscore::FOURSCORE_ISA {
namespace {

// Rows and vectors of sums that the registers hold beside their operands.
#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVectors = 2;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif

// One value a step, f32.
struct Singles {
    using E = float;
    static constexpr i64 kPer = 1;
    using Operand = Vec;
    static Operand operand(const E* p) { return load<Float::f32>(p, 0); }
    static Operand spread(const E* p) { return all(*p); }
    static Vec multiply_add(Vec acc, Operand a, Operand b) { return fma(a, b, acc); }
    static E from(const void* p, i64 i, Float type) { return load_one(p, i, type); }
    static void put(E* p, Vec v) { store<Float::f32>(p, 0, v); }
    static void put_beside(E* p, const Vec* v) { put(p, v[0]); }
    static void copy(const void* p, i64 n, Float type, E* out) {
        for (i64 i = 0; i < n; ++i) out[i] = load_one(p, i, type);
    }
};

#if defined(__AVX512BF16__)
// Two values a step, bf16, summed in f32.
struct Pairs {
    using E = u16;
    static constexpr i64 kPer = 2;
    using Operand = __m512i;
    static Operand operand(const E* p) { return _mm512_loadu_si512(p); }
    static Operand spread(const E* p) {
        int pair;
        std::memcpy(&pair, p, 4);
        return _mm512_set1_epi32(pair);
    }
    static Vec multiply_add(Vec acc, Operand a, Operand b) {
        return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
    static E from(const void* p, i64 i, Float) {
        u16 h;
        std::memcpy(&h, static_cast<const char*>(p) + 2 * i, 2);
        return h;
    }
    static void put(E* p, Vec v) { store<Float::bf16>(p, 0, v); }
    // Two rows' values of one column side by side.
    static void put_beside(E* p, const Vec* v) {
        Bits low = __builtin_convertvector(narrow(v[0]), Bits), high = __builtin_convertvector(narrow(v[1]), Bits);
        Bits both = low | high << 16;
        std::memcpy(p, &both, sizeof both);
    }
    static void copy(const void* p, i64 n, Float, E* out) { std::memcpy(out, p, static_cast<std::size_t>(2 * n)); }
};
#endif

template <int N, class Body>
static inline void with_number(i64 n, const Body& body) {
    if constexpr (N == 1)
        body.template operator()<1>();
    else if (n == N)
        body.template operator()<N>();
    else
        with_number<N - 1>(n, body);
}

}  // namespace
}  // namespace fourscore::FOURSCORE_ISA
