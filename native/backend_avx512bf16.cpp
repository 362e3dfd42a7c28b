// AVX-512 with bf16 dot products: two products a lane, summed in f32.
#define FOURSCORE_ISA avx512bf16
#include "avx512.h"

namespace fourscore::avx512bf16 {
namespace {

struct Bf16Ops {
    using E = u16;
    using Vec = __m512i;
    using Acc = __m512;
    static constexpr int kWidth = 32, kLanes = 16, kRows = 6, kStep = 2;
    static constexpr i64 kChunkUnits = 16;

    static Vec load(const E* p) { return _mm512_loadu_si512(p); }
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
    static void sum4(const Acc* a, float* c, bool add) { add_up4(a, c, add); }

    // The table twice: the bit above a code's four then does not matter, and the other bits are not looked at.
    using Table = __m512i;
    static Table table(float scale, Float) {
        __m256i t = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_mul_ps(values(), _mm512_set1_ps(scale))));
        return _mm512_broadcast_i64x4(t);
    }
    // The 32 codes with even k (high nibbles), then the 32 with odd k.
    static void decode(const u8* bytes, Table t, Vec* out) {
        __m512i b = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
        out[0] = _mm512_permutexvar_epi16(_mm512_srli_epi16(b, 4), t);
        out[1] = _mm512_permutexvar_epi16(b, t);
    }

    static void split(__m512i a, __m512i b, E* out) {
        const __m512i mask = _mm512_set1_epi32(0xffff), order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
        __m512i even = _mm512_packus_epi32(_mm512_and_si512(a, mask), _mm512_and_si512(b, mask));
        __m512i odd = _mm512_packus_epi32(_mm512_srli_epi32(a, 16), _mm512_srli_epi32(b, 16));
        store(out, _mm512_permutexvar_epi64(order, even));
        store(out + 32, _mm512_permutexvar_epi64(order, odd));
    }
    static void permute_from(const void* x, Float, E* out) {
        const E* p = static_cast<const E*>(x);
        split(load(p), load(p + 32), out);
    }
    static void permute(const float* natural, E* out) {
        alignas(64) E h[kUnit];
        for (i64 i = 0; i < kUnit; ++i) h[i] = to_bf16(natural[i]);
        permute_from(h, Float::bf16, out);
    }
    // Two rows to pairs of neighbours down the column: [even k low half, high half, odd k low half, high half] by 128-bit lane.
    static void interleave(const E* row, const E* next, Vec* out) {
        for (int h = 0; h < 2; ++h) {
            __m512i a = load(row + 32 * h), b = load(next + 32 * h);
            out[2 * h] = _mm512_unpacklo_epi16(a, b);
            out[2 * h + 1] = _mm512_unpackhi_epi16(a, b);
        }
    }
    static void unpermute(const float* c, float* natural) {
        __m512 a = load_acc(c), b = load_acc(c + 16), d = load_acc(c + 32), e = load_acc(c + 48);
        __m512 t[4] = {_mm512_unpacklo_ps(a, d), _mm512_unpackhi_ps(a, d), _mm512_unpacklo_ps(b, e), _mm512_unpackhi_ps(b, e)};
        // Lane q of t[0..3] is the q-th vector of the result: a transpose of 4 x 4 lanes.
        __m512 u0 = _mm512_shuffle_f32x4(t[0], t[1], 0x44), u1 = _mm512_shuffle_f32x4(t[0], t[1], 0xee);
        __m512 v0 = _mm512_shuffle_f32x4(t[2], t[3], 0x44), v1 = _mm512_shuffle_f32x4(t[2], t[3], 0xee);
        store_acc(natural, _mm512_shuffle_f32x4(u0, v0, 0x88));
        store_acc(natural + 16, _mm512_shuffle_f32x4(u0, v0, 0xdd));
        store_acc(natural + 32, _mm512_shuffle_f32x4(u1, v1, 0x88));
        store_acc(natural + 48, _mm512_shuffle_f32x4(u1, v1, 0xdd));
    }
    static void convert(const void* x, Float, i64 n, i64 padded, E* out) {
        std::memcpy(out, x, static_cast<std::size_t>(n) * sizeof(E));
        for (i64 i = n; i < padded; ++i) out[i] = 0;
    }
    static void store_row(const float* v, const float* bias, i64 n, void* out, Float type) { store_rounded(v, bias, n, out, type); }
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
