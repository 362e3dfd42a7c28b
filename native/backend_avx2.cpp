// AVX2, FMA and F16C: every x86 machine of the last ten years. Products in f32; for bf16 and f16 inputs the decoded weights
// are rounded to that type first, as a dense layer's would be.
#define FOURSCORE_ISA avx2
#include <immintrin.h>

#include "codec.h"
#include "linear.h"

namespace fourscore::avx2 {
namespace {

static inline __m256 load8(const void* x, i64 i, Float type) {
    if (type == Float::f32) return _mm256_loadu_ps(static_cast<const float*>(x) + i);
    __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const u16*>(x) + i));
    if (type == Float::f16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

// To nearest even; NaN stays NaN.
static inline __m256i bf16_bits(__m256 f) {
    __m256i b = _mm256_castps_si256(f);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(r, 16), _mm256_set1_epi32(0x7fc0), nan);
}

static inline void store8(void* out, i64 i, Float type, __m256 f) {
    if (type == Float::f32) return _mm256_storeu_ps(static_cast<float*>(out) + i, f);
    __m128i h;
    if (type == Float::f16) {
        h = _mm256_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
        __m256i b = bf16_bits(f);
        h = _mm_packus_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<u16*>(out) + i), h);
}

static inline __m256 round8(__m256 f, Float type) {
    if (type == Float::bf16) return _mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits(f), 16));
    if (type == Float::f16) return _mm256_cvtph_ps(_mm256_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return f;
}

struct Codec : PlainCodec {
    static void codes(const void* source, Float type, i64 start, i64 count, float inverse, u8* packed) {
        __m256 scale = _mm256_set1_ps(inverse);
        for (i64 i = 0; i < count; i += 32) {
            __m256i code[4];
            for (int h = 0; h < 4; ++h) {
                __m256 v = _mm256_mul_ps(load8(source, start + i + 8 * h, type), scale);
                __m256i c = _mm256_setzero_si256();
                for (float m : kMidpoint) c = _mm256_sub_epi32(c, _mm256_castps_si256(_mm256_cmp_ps(v, _mm256_set1_ps(m), _CMP_GT_OQ)));
                code[h] = c;
            }
            // 32 codes as bytes, in order; then neighbours joined: 16 * even + odd.
            __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(code[0], code[1]), _mm256_packs_epi32(code[2], code[3]));
            bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
            __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
            __m256i joined = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + (start + i) / 2), _mm256_castsi256_si128(joined));
        }
    }

    static void expand(const u8* packed, i64 bytes, float scale, void* out, Float type) {
        i64 done = 0;
        if (type != Float::f32) {
            // The 16 possible results as two byte tables: a shuffle looks each half of a result up.
            alignas(16) u16 table[16];
            for (int c = 0; c < 16; ++c) store_one(table, c, type, kValues[c] * scale);
            __m128i t0 = _mm_load_si128(reinterpret_cast<const __m128i*>(table)), t1 = _mm_load_si128(reinterpret_cast<const __m128i*>(table + 8));
            __m128i mask = _mm_set1_epi16(0xff), nibble = _mm_set1_epi8(15);
            __m128i low = _mm_packus_epi16(_mm_and_si128(t0, mask), _mm_and_si128(t1, mask));
            __m128i high = _mm_packus_epi16(_mm_srli_epi16(t0, 8), _mm_srli_epi16(t1, 8));
            u16* o = static_cast<u16*>(out);
            for (; done + 16 <= bytes; done += 16) {
                __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + done));
                __m128i first = _mm_and_si128(_mm_srli_epi16(b, 4), nibble), second = _mm_and_si128(b, nibble);
                __m128i c[2] = {_mm_unpacklo_epi8(first, second), _mm_unpackhi_epi8(first, second)};
                for (int h = 0; h < 2; ++h) {
                    __m128i l = _mm_shuffle_epi8(low, c[h]), g = _mm_shuffle_epi8(high, c[h]);
                    _mm_storeu_si128(reinterpret_cast<__m128i*>(o + 2 * done + 16 * h), _mm_unpacklo_epi8(l, g));
                    _mm_storeu_si128(reinterpret_cast<__m128i*>(o + 2 * done + 16 * h + 8), _mm_unpackhi_epi8(l, g));
                }
            }
        }
        PlainCodec::expand(packed + done, bytes - done, scale, at(out, 2 * done, type), type);
    }
};

struct Ops {
    using E = float;
    using Vec = __m256;
    using Few = Ops;
    using Acc = __m256;
    static constexpr int kWidth = 8, kLanes = 8, kPer = 1, kRows = 3, kFewRows = 3;
    static constexpr i64 kChunkUnits = 8;

    static Vec load(const E* p) { return _mm256_loadu_ps(p); }
    static Vec load_x(const E* p) { return load(p); }
    static void store(E* p, Vec v) { _mm256_storeu_ps(p, v); }
    static Acc zero() { return _mm256_setzero_ps(); }
    static Acc fma(Acc a, Vec x, Vec w) { return _mm256_fmadd_ps(x, w, a); }
    static Acc load_acc(const float* p) { return _mm256_loadu_ps(p); }
    static void store_acc(float* p, Acc a) { _mm256_storeu_ps(p, a); }
    static Vec spread(const E* d, i64 s) { return _mm256_broadcast_ss(d + s); }

    static void sum4(const Acc* a, float* out) {
        __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a[0], a[1]), _mm256_unpackhi_ps(a[0], a[1]));
        __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(a[2], a[3]), _mm256_unpackhi_ps(a[2], a[3]));
        __m256 s = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
        __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
        _mm_storeu_ps(out, t);
    }
    template <int R, int J>
    static void sums(const Acc (&a)[R][J], float* out) {
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < J; j += 4) sum4(a[i] + j, out + i * J + j);
    }
    static void scales(const Weight& w, i64 first, i64 count, float* out) {
        for (i64 i = 0; i < count; ++i) out[i] = scale_of(w, first + i);
    }
    template <int N>
    static void store_outputs(const float* v, const float* bias, void* out, Float type) {
        store_row(v, bias, N, out, type);
    }

    struct Table {
        __m256 low, high;
    };
    static Table table(const float* scale, Float round) {
        __m256 s = _mm256_set1_ps(*scale);
        return {round8(_mm256_mul_ps(_mm256_loadu_ps(kValues), s), round), round8(_mm256_mul_ps(_mm256_loadu_ps(kValues + 8), s), round)};
    }
    static __m256 look_up(__m256i index, const Table& t) {
        __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index), upper);
    }
    // Groups of 16: the 8 codes with even k (high nibbles), then the 8 with odd k.
    static void decode(const u8* const* rows, const Table& t, Vec* out) {
        for (int g = 0; g < 4; ++g) {
            __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[0] + 8 * g)));
            out[2 * g] = look_up(_mm256_srli_epi32(b, 4), t);
            out[2 * g + 1] = look_up(b, t);
        }
    }
    static void decode2(const u8* const* rows, const float* scale, Float round, Vec* first, Vec* second) {
        decode(rows, table(scale, round), first);
        decode(rows + 1, table(scale + 1, round), second);
    }
    static void split(__m256 a, __m256 b, E* out) {
        __m256 even = _mm256_shuffle_ps(a, b, 0x88), odd = _mm256_shuffle_ps(a, b, 0xdd);
        store(out, _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8)));
        store(out + 8, _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xd8)));
    }
    static void lay_out(const void* x, Float type, E* out) {
        for (int g = 0; g < 4; ++g) split(load8(x, 16 * g, type), load8(x, 16 * g + 8, type), out + 16 * g);
    }
    static void place(const float (*natural)[kUnit], Vec* out) {
        float ordered[kUnit];
        lay_out(natural[0], Float::f32, ordered);
        for (int i = 0; i < 8; ++i) out[i] = load(ordered + 8 * i);
    }
    static void natural(const float* c, float* out) {
        for (int g = 0; g < 4; ++g) {
            __m256 even = load(c + 16 * g), odd = load(c + 16 * g + 8);
            __m256 a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);
            store(out + 16 * g, _mm256_permute2f128_ps(a, b, 0x20));
            store(out + 16 * g + 8, _mm256_permute2f128_ps(a, b, 0x31));
        }
    }
    static Vec columns(Vec v) { return v; }
    static void convert(const void* x, Float type, i64 n, i64 padded, E* out) {
        i64 i = 0;
        for (; i + 8 <= n; i += 8) store(out + i, load8(x, i, type));
        for (; i < n; ++i) out[i] = load_one(x, i, type);
        for (; i < padded; ++i) out[i] = 0;
    }
    static void store_row(const float* values, const float* bias, i64 n, void* out, Float type) {
        i64 i = 0;
        for (; i + 8 <= n; i += 8) {
            __m256 v = load(values + i);
            store8(out, i, type, bias ? _mm256_add_ps(v, load(bias + i)) : v);
        }
        for (; i < n; ++i) store_one(out, i, type, bias ? values[i] + bias[i] : values[i]);
    }
};

}  // namespace
}  // namespace fourscore::avx2

namespace fourscore {
const Backend kAvx2{"avx2", avx2::quantize<avx2::Codec>, avx2::dequantize<avx2::Codec>, avx2::forward<avx2::Ops>, avx2::backward<avx2::Ops>};
}
