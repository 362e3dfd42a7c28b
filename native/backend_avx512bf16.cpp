// AVX-512 with bf16 dot products (two products a lane, summed in f32) and byte permutations (VBMI).
#define FOURSCORE_ISA avx512bf16
#include "avx512.h"

namespace fourscore::avx512bf16 {
namespace {

// One row of W: the order of sums of Bf16Ops, whose vectors are two of these side by side.
struct OneRow {
    using E = u16;
    using Vec = __m256i;
    using Acc = __m256;
    static constexpr int kWidth = 16, kPer = 1;
    static constexpr i64 kChunkUnits = 16;

    static Vec load_x(const E* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static Acc zero() { return _mm256_setzero_ps(); }
    static Acc fma(Acc a, Vec x, Vec w) { return _mm256_dpbf16_ps(a, reinterpret_cast<__m256bh>(x), reinterpret_cast<__m256bh>(w)); }

    static __m256 halves(__m256 a, __m256 b) {
        __m256d x = _mm256_castps_pd(a), y = _mm256_castps_pd(b);
        return _mm256_add_ps(_mm256_castpd_ps(_mm256_blend_pd(x, y, 0xa)), _mm256_castpd_ps(_mm256_shuffle_pd(x, y, 0x5)));
    }
    template <int R, int J>
    static void sums(const Acc (&a)[R][J], float* out) {
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < J; j += 4) {
                __m256 ab = halves(a[i][j], a[i][j + 1]), cd = halves(a[i][j + 2], a[i][j + 3]);
                __m256 s = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x88), _mm256_shuffle_ps(ab, cd, 0xdd));
                _mm_storeu_ps(out + i * J + j, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
            }
    }
    static void scales(const Weight& w, i64 first, i64 count, float* out) { scales_of(w, first, count, out); }
    template <int N>
    static void store_outputs(const float* v, const float* bias, void* out, Float type) {
        store_few<N>(v, bias, out, type);
    }
    static void store_row(const float* v, const float* bias, i64 n, void* out, Float type) { store_rounded(v, bias, n, out, type); }

    // Vector by vector over all rows: only the rows' tables and sums stay in registers, no decoded unit does.
    template <int R, int J>
    static void multiply(const u8* const* rows, const float* const* scales, i64 u, const E* x, i64 x_stride, Acc (&acc)[R][J]) {
        const __m256 low = _mm256_loadu_ps(kValues), high = _mm256_loadu_ps(kValues + 8);
        Vec table[J];
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j) {
            const __m256 s = _mm256_set1_ps(scales[j][u]);
            table[j] = reinterpret_cast<__m256i>(_mm256_cvtne2ps_pbh(_mm256_mul_ps(high, s), _mm256_mul_ps(low, s)));
        }
#pragma GCC unroll 4
        for (int h = 0; h < 4; ++h) {
            constexpr int kShift[4] = {4, 0, 12, 8};  // as in Bf16Ops::decode
#pragma GCC unroll 8
            for (int j = 0; j < J; ++j) {
                __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[j] + u * 32));
                Vec w = _mm256_permutexvar_epi16(_mm256_srli_epi16(b, kShift[h]), table[j]);
#pragma GCC unroll 8
                for (int i = 0; i < R; ++i) acc[i][j] = fma(acc[i][j], load_x(x + i * x_stride + 16 * h), w);
            }
        }
    }
};

// A vector holds 16 weights of each of two rows. Products of one row of x with both at once: x's 16 elements in both halves.
struct Bf16Ops {
    using Few = OneRow;
    using E = u16;
    using Vec = __m512i;
    using Acc = __m512;
    static constexpr int kWidth = 32, kLanes = 16, kPer = 2, kRows = 6, kFewRows = 6;
    static constexpr i64 kChunkUnits = 16;

    static Vec load(const E* p) { return _mm512_loadu_si512(p); }
    static Vec load_x(const E* p) { return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    static void store(E* p, Vec v) { _mm512_storeu_si512(p, v); }
    static Acc zero() { return _mm512_setzero_ps(); }
    static Acc fma(Acc a, Vec x, Vec w) { return _mm512_dpbf16_ps(a, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w)); }
    static Acc load_acc(const float* p) { return _mm512_loadu_ps(p); }
    static void store_acc(float* p, Acc a) { _mm512_storeu_ps(p, a); }
    static Vec spread(const E* d, i64 s) {
        int pair;
        std::memcpy(&pair, d + 2 * s, 4);
        return _mm512_set1_epi32(pair);
    }

    // Lanes 0 to 7 belong to outputs 0 to 3, lanes 8 to 15 to outputs 4 to 7; the order is that of add_up4 without its third step.
    static __m512 neighbour_quarters(__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    template <int R, int J>
    static void sums(const Acc (&a)[R][J], float* out) {
        static_assert(J == 4);
        int i = 0;
        for (; i + 2 <= R; i += 2) _mm512_storeu_ps(out + i * 8, neighbour_quarters(quarters_of4(a[i]), quarters_of4(a[i + 1])));
        if (R % 2) {
            __m512 last = quarters_of4(a[R - 1]);
            _mm256_storeu_ps(out + (R - 1) * 8, _mm512_castps512_ps256(neighbour_quarters(last, last)));
        }
    }
    static void scales(const Weight& w, i64 first, i64 count, float* out) { scales_of(w, first, count, out); }
    template <int N>
    static void store_outputs(const float* v, const float* bias, void* out, Float type) {
        store_few<N>(v, bias, out, type);
    }
    static void store_row(const float* v, const float* bias, i64 n, void* out, Float type) { store_rounded(v, bias, n, out, type); }

    // The 16 values of the first row, then those of the second.
    using Table = __m512i;
    static Table table(const float* scale, Float) {
        __m512 first = _mm512_mul_ps(values(), _mm512_set1_ps(scale[0])), second = _mm512_mul_ps(values(), _mm512_set1_ps(scale[1]));
        return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
    }
    // 16 bits hold the codes k = 4j + 1, 4j, 4j + 3, 4j + 2, lowest first; vector r takes those with k = 4j + r.
    static void decode(const u8* const* rows, Table t, Vec* out) {
        const __m512i code = _mm512_set1_epi16(15), row = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
        __m512i b = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[0])));
        b = _mm512_mask_broadcast_i64x4(b, 0xf0, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[1])));
        // (b & code) | row
        auto look_up = [&](__m512i bits) { return _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(bits, code, row, 0xea), t); };
        out[0] = look_up(_mm512_srli_epi16(b, 4));
        out[1] = look_up(b);
        out[2] = look_up(_mm512_srli_epi16(b, 12));
        out[3] = look_up(_mm512_srli_epi16(b, 8));
    }

    // Elements 4j, then 4j + 1, 4j + 2, 4j + 3.
    static void lay_out(const void* x, Float, E* out) {
        const E* p = static_cast<const E*>(x);
        __m512i a = load(p), b = load(p + 32);
        alignas(64) static constexpr u16 kFirst[32] = {0, 4, 8,  12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60,
                                                       1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 61};
        __m512i first = _mm512_load_si512(kFirst);
        store(out, _mm512_permutex2var_epi16(a, first, b));
        store(out + 32, _mm512_permutex2var_epi16(a, _mm512_add_epi16(first, _mm512_set1_epi16(2)), b));
    }
    static void place(const float (*natural)[kUnit], Vec* out) {
        alignas(64) E half[2][kUnit], ordered[2][kUnit];
        for (int r = 0; r < 2; ++r) {
            for (i64 i = 0; i < kUnit; ++i) half[r][i] = to_bf16(natural[r][i]);
            lay_out(half[r], Float::bf16, ordered[r]);
        }
        for (int h = 0; h < 4; ++h)
            out[h] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(ordered[0] + 16 * h))),
                                        _mm256_load_si256(reinterpret_cast<const __m256i*>(ordered[1] + 16 * h)), 1);
    }

    // Both rows' weights of one k side by side.
    static Vec columns(Vec v) {
        alignas(64) static constexpr u16 kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        return _mm512_permutexvar_epi16(_mm512_load_si512(kPairs), v);
    }
    // Sums for k = 4j + r, r by r, to natural order: neighbours first, then a transpose of 4 x 4 quarters.
    static void natural(const float* c, float* out) {
        __m512 a[4];
        for (int r = 0; r < 4; ++r) a[r] = load_acc(c + 16 * r);
        __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(a[0], a[1])), high01 = _mm512_castps_pd(_mm512_unpackhi_ps(a[0], a[1]));
        __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(a[2], a[3])), high23 = _mm512_castps_pd(_mm512_unpackhi_ps(a[2], a[3]));
        __m512 t[4] = {_mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23)), _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23)),
                       _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23)), _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23))};
        __m512 u0 = _mm512_shuffle_f32x4(t[0], t[1], 0x44), u1 = _mm512_shuffle_f32x4(t[0], t[1], 0xee);
        __m512 v0 = _mm512_shuffle_f32x4(t[2], t[3], 0x44), v1 = _mm512_shuffle_f32x4(t[2], t[3], 0xee);
        store_acc(out, _mm512_shuffle_f32x4(u0, v0, 0x88));
        store_acc(out + 16, _mm512_shuffle_f32x4(u0, v0, 0xdd));
        store_acc(out + 32, _mm512_shuffle_f32x4(u1, v1, 0x88));
        store_acc(out + 48, _mm512_shuffle_f32x4(u1, v1, 0xdd));
    }
    static void convert(const void* x, Float, i64 n, i64 padded, E* out) {
        std::memcpy(out, x, static_cast<std::size_t>(n) * sizeof(E));
        for (i64 i = n; i < padded; ++i) out[i] = 0;
    }
};

void forward_any(const Weight& w, const void* x, i64 m, i64 x_stride, Float type, const float* bias, void* y, int threads) {
    if (type == Float::bf16)
        forward<Bf16Ops>(w, x, m, x_stride, type, bias, y, threads);
    else
        forward<F32Ops>(w, x, m, x_stride, type, bias, y, threads);
}

void backward_any(const Weight& w, const void* dy, i64 m, i64 dy_stride, Float type, void* dx, int threads) {
    if (type == Float::bf16)
        backward<Bf16Ops>(w, dy, m, dy_stride, type, dx, threads);
    else
        backward<F32Ops>(w, dy, m, dy_stride, type, dx, threads);
}

}  // namespace
}  // namespace fourscore::avx512bf16

namespace fourscore {
const Backend kAvx512Bf16{"avx512-bf16", avx512bf16::quantize<avx512bf16::Codec>, avx512bf16::dequantize<avx512bf16::Codec>,
                          avx512bf16::forward_any, avx512bf16::backward_any};
}
