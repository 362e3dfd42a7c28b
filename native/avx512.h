// What both AVX-512 backends share: conversions, the codec, and f32 products.
#pragma once

#include <immintrin.h>

#include "codec.h"
#include "linear.h"

namespace fourscore::FOURSCORE_ISA {
namespace {

static inline __m512 load16(const void* x, i64 i, Float type) {
    if (type == Float::f32) return _mm512_loadu_ps(static_cast<const float*>(x) + i);
    __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const u16*>(x) + i));
    if (type == Float::f16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

// To nearest even; NaN stays NaN. The machine's own conversion takes subnormals for zero, and so does bitsandbytes where it has
// that instruction; elsewhere both keep them.
static inline __m256i bf16_16(__m512 f) {
#ifdef __AVX512BF16__
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(f));
#else
    __m512i b = _mm512_castps_si512(f);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0)));
#endif
}

static inline __m256i half_16(__m512 f, Float type) {
    return type == Float::f16 ? _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) : bf16_16(f);
}

static inline __m512 round16(__m512 f, Float type) {
    if (type == Float::f32) return f;
    __m256i h = half_16(f, type);
    return type == Float::f16 ? _mm512_cvtph_ps(h) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

static inline void store16(void* out, i64 i, Float type, __m512 f) {
    if (type == Float::f32) return _mm512_storeu_ps(static_cast<float*>(out) + i, f);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<u16*>(out) + i), half_16(f, type));
}

static inline __m512 values() { return _mm512_loadu_ps(kValues); }

// [-1, 1] in 32 equal parts: each holds at most one midpoint, so the part gives the code but for one comparison.
struct Parts {
    alignas(64) float midpoint[32];
    alignas(64) int code[32];
    constexpr Parts() : midpoint{}, code{} {
        for (int p = 0; p < 32; ++p) {
            float low = static_cast<float>(p - 16) / 16, high = static_cast<float>(p - 15) / 16;
            midpoint[p] = 2.0f;
            code[p] = 0;
            for (float m : kMidpoint) {
                if (m < low) ++code[p];
                if (m >= low && m < high) midpoint[p] = m;
            }
        }
    }
};
constexpr Parts kParts;

#ifdef __AVX512VBMI__
// out[i] = table[codes[i]], for whole groups of 64; gives how many. The table is taken apart into its four byte planes, each of
// which fits four registers, and 64 codes are looked up at once: several times faster than loading value by value.
static inline i64 look_up_many(const float* table, const u8* codes, i64 count, float* out) {
    if (count < 128) return 0;
    // Byte p of 32 floats in two registers: bytes p, 4 + p, ...
    __m512i every4 = _mm512_setr_epi64(0x1c1814100c080400, 0x3c3834302c282420, 0x5c5854504c484440, 0x7c7874706c686460, 0, 0, 0, 0);
    __m512i plane[4][4];
    for (int g = 0; g < 4; ++g) {
        __m512i z[4];
        for (int h = 0; h < 4; ++h) z[h] = _mm512_loadu_si512(table + 64 * g + 16 * h);
        for (int p = 0; p < 4; ++p) {
            __m512i index = _mm512_add_epi8(every4, _mm512_set1_epi8(static_cast<char>(p)));
            __m512i low = _mm512_permutex2var_epi8(z[0], index, z[1]), high = _mm512_permutex2var_epi8(z[2], index, z[3]);
            plane[p][g] = _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1);
        }
    }
    // Quarters' dwords transposed, so that the unpacking below ends in order.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    i64 i = 0;
    for (; i + 64 <= count; i += 64) {
        __m512i code = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes + i));
        __mmask64 upper = _mm512_movepi8_mask(code);
        __m512i b[4];
        for (int p = 0; p < 4; ++p)
            b[p] = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(plane[p][0], code, plane[p][1]),
                                          _mm512_permutex2var_epi8(plane[p][2], code, plane[p][3]));
        __m512i low01 = _mm512_unpacklo_epi8(b[0], b[1]), high01 = _mm512_unpackhi_epi8(b[0], b[1]);
        __m512i low23 = _mm512_unpacklo_epi8(b[2], b[3]), high23 = _mm512_unpackhi_epi8(b[2], b[3]);
        _mm512_storeu_si512(out + i, _mm512_unpacklo_epi16(low01, low23));
        _mm512_storeu_si512(out + i + 16, _mm512_unpackhi_epi16(low01, low23));
        _mm512_storeu_si512(out + i + 32, _mm512_unpacklo_epi16(high01, high23));
        _mm512_storeu_si512(out + i + 48, _mm512_unpackhi_epi16(high01, high23));
    }
    return i;
}
#else
static inline i64 look_up_many(const float*, const u8*, i64, float*) { return 0; }
#endif

// The double quantisation undone; product and sum rounded one by one. What look_up_many leaves is copied with plain loads and
// stores (a gather costs more, and these run beside the vector units; the empty asm keeps the compiler from making one) and
// scaled afterwards: by then the first stores have left the store queue.
static inline void scales_of(const Weight& w, i64 first, i64 count, float* out) {
    if (w.scales) {
        std::memcpy(out, w.scales + first, static_cast<std::size_t>(count) * sizeof(float));
        return;
    }
    const u8* codes = w.codes + first;
#pragma GCC unroll 8
    for (i64 i = look_up_many(w.nested_code, codes, count, out); i < count; ++i) {
        u32 value = bits_of(w.nested_code[codes[i]]);
        asm("" : "+r"(value));
        std::memcpy(out + i, &value, 4);
    }
    const __m512 offset = _mm512_set1_ps(w.nested_offset);
    for (i64 i = 0; i < count;) {
        i64 nested = (first + i) / w.nested_block, end = least(count, (nested + 1) * w.nested_block - first);
        const __m512 absmax = _mm512_set1_ps(w.nested_absmax[nested]);
        for (; i + 16 <= end; i += 16)
            _mm512_storeu_ps(out + i, _mm512_add_ps(_mm512_mul_ps(_mm512_loadu_ps(out + i), absmax), offset));
        if (i < end) {
            __mmask16 here = static_cast<__mmask16>((1u << least(16, end - i)) - 1);
            __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(here, out + i), absmax);
            _mm512_mask_storeu_ps(out + i, here, _mm512_add_ps(value, offset));
        }
        i = end;
    }
}

struct Codec : PlainCodec {
    static u32 absmax(const void* source, Float type, i64 start, i64 count) {
        if (type == Float::f32) {
            __m512i magnitude = _mm512_set1_epi32(0x7fffffff), largest = _mm512_setzero_si512();
            for (i64 i = 0; i < count; i += 16)
                largest = _mm512_max_epu32(
                    largest, _mm512_and_si512(_mm512_castps_si512(load16(source, start + i, Float::f32)), magnitude));
            return _mm512_reduce_max_epu32(largest);
        }
        __m256i magnitude = _mm256_set1_epi16(0x7fff), largest = _mm256_setzero_si256();
        const u16* p = static_cast<const u16*>(source) + start;
        for (i64 i = 0; i < count; i += 16)
            largest = _mm256_max_epu16(largest, _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i)), magnitude));
        // minpos finds the least of 8: of the complements.
        __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
        u16 half = static_cast<u16>(~_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1))), 0));
        return bits_of(type == Float::bf16 ? from_bf16(half) : from_f16(half));
    }

    static void codes(const void* source, Float type, i64 start, i64 count, float inverse, u8* packed) {
        const __m512 scale = _mm512_set1_ps(inverse), sixteen = _mm512_set1_ps(16.0f);
        const __m512 m0 = _mm512_load_ps(kParts.midpoint), m1 = _mm512_load_ps(kParts.midpoint + 16);
        const __m512i c0 = _mm512_load_si512(kParts.code), c1 = _mm512_load_si512(kParts.code + 16);
        const __m512i last = _mm512_set1_epi32(31), one = _mm512_set1_epi32(1);
        for (i64 i = 0; i < count; i += 16) {
            __m512 v = _mm512_mul_ps(load16(source, start + i, type), scale);
            __m512i part = _mm512_min_epi32(_mm512_cvttps_epi32(_mm512_fmadd_ps(v, sixteen, sixteen)), last);
            __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_permutex2var_ps(m0, part, m1), _CMP_GT_OQ);
            __m512i code = _mm512_permutex2var_epi32(c0, part, c1);
            code = _mm512_mask_add_epi32(code, above, code, one);
            __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(packed + (start + i) / 2), _mm512_cvtepi64_epi8(pairs));
        }
    }

    static void expand(const u8* packed, i64 bytes, float scale, void* out, Float type) {
        const __m512 product = _mm512_mul_ps(values(), _mm512_set1_ps(scale));
        i64 done = 0;
        if (type == Float::f32) {
            const __m128i nibble = _mm_set1_epi8(15);
            float* o = static_cast<float*>(out);
            for (; done + 16 <= bytes; done += 16) {
                __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + done));
                __m128i first = _mm_and_si128(_mm_srli_epi16(b, 4), nibble), second = _mm_and_si128(b, nibble);
                _mm512_storeu_ps(o + 2 * done, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(first, second)), product));
                _mm512_storeu_ps(o + 2 * done + 16, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpackhi_epi8(first, second)), product));
            }
        } else {
            // Twice, since an index has a fifth bit that means nothing.
            const __m512i table = _mm512_broadcast_i64x4(half_16(product, type));
            u16* o = static_cast<u16*>(out);
            for (; done + 16 <= bytes; done += 16) {
                __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + done));
#ifdef __AVX512VBMI__
                // Two bytes to 64 bits, from which four 16-bit fields take their four bits from 4, 0, 12 and 8 on.
                __m512i codes = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x0008000c00000004), _mm512_cvtepu16_epi64(b));
#else
                // A byte to 32 bits: b >> 4 below, b above.
                __m512i wide = _mm512_cvtepu8_epi32(b);
                __m512i codes = _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16));
#endif
                _mm512_storeu_si512(o + 2 * done, _mm512_permutexvar_epi16(codes, table));
            }
        }
        PlainCodec::expand(packed + done, bytes - done, scale, at(out, 2 * done, type), type);
    }

    static void scales(const Weight& w, i64 first, i64 count, float* out) { scales_of(w, first, count, out); }
};

static inline void store_rounded(const float* values, const float* bias, i64 n, void* out, Float type) {
    i64 i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512 v = _mm512_loadu_ps(values + i);
        store16(out, i, type, bias ? _mm512_add_ps(v, _mm512_loadu_ps(bias + i)) : v);
    }
    for (; i < n; ++i) store_one(out, i, type, bias ? values[i] + bias[i] : values[i]);
}

// Lane sums, always in one order: lanes 0 + 2 and 1 + 3 of each quarter, the two of them, quarters 0 + 2 and 1 + 3, the two of
// them. Sixteen sums at once share the shuffles; four at a time for what is left.
static inline __m512 halves(__m512 a, __m512 b) {
    __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_mask_blend_pd(0xaa, x, y)), _mm512_castpd_ps(_mm512_shuffle_pd(x, y, 0x55)));
}
static inline __m512 quarters_of4(const __m512* a) {
    __m512 ab = halves(a[0], a[1]), cd = halves(a[2], a[3]);
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xdd));
}
static inline void add_up4(const __m512* a, float* out) {
    __m512 s = quarters_of4(a);
    __m256 t = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
}
static inline __m512 opposite_quarters(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
}
static inline void add_up16(const __m512 (*a)[4], float* out) {
    __m512 s = opposite_quarters(quarters_of4(a[0]), quarters_of4(a[1]));
    __m512 t = opposite_quarters(quarters_of4(a[2]), quarters_of4(a[3]));
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_shuffle_f32x4(s, t, 0x88), _mm512_shuffle_f32x4(s, t, 0xdd)));
}
// 4 or 8 outputs, finished.
template <int N>
static inline void store_few(const float* values, const float* bias, void* out, Float type) {
    constexpr __mmask16 here = (1u << N) - 1;
    __m512 v = _mm512_maskz_loadu_ps(here, values);
    if (bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(here, bias));
    if (type == Float::f32)
        _mm512_mask_storeu_ps(out, here, v);
    else
        _mm256_mask_storeu_epi16(out, here, half_16(v, type));
}

// Products in f32: f32 inputs on any AVX-512 machine, and bf16 or f16 inputs (weights rounded to that type first).
struct F32Ops {
    using Few = F32Ops;
    using E = float;
    using Vec = __m512;
    using Acc = __m512;
    static constexpr int kWidth = 16, kLanes = 16, kPer = 1, kRows = 6, kFewRows = 4;
    static constexpr i64 kChunkUnits = 8;

    static Vec load(const E* p) { return _mm512_loadu_ps(p); }
    static Vec load_x(const E* p) { return load(p); }
    static void store(E* p, Vec v) { _mm512_storeu_ps(p, v); }
    static Acc zero() { return _mm512_setzero_ps(); }
    static Acc fma(Acc a, Vec x, Vec w) { return _mm512_fmadd_ps(x, w, a); }
    static Acc load_acc(const float* p) { return _mm512_loadu_ps(p); }
    static void store_acc(float* p, Acc a) { _mm512_storeu_ps(p, a); }
    static Vec spread(const E* d, i64 s) { return _mm512_set1_ps(d[s]); }
    template <int R, int J>
    static void sums(const Acc (&a)[R][J], float* out) {
        int i = 0;
        if constexpr (J == 4)
            for (; i + 4 <= R; i += 4) add_up16(a + i, out + i * 4);
        for (; i < R; ++i)
            for (int j = 0; j < J; j += 4) add_up4(a[i] + j, out + i * J + j);
    }
    static void scales(const Weight& w, i64 first, i64 count, float* out) { scales_of(w, first, count, out); }
    template <int N>
    static void store_outputs(const float* v, const float* bias, void* out, Float type) {
        store_few<N>(v, bias, out, type);
    }

    using Table = __m512;
    static Table table(const float* scale, Float round) { return round16(_mm512_mul_ps(values(), _mm512_set1_ps(*scale)), round); }
    // Groups of 32: the 16 codes with even k (high nibbles), then the 16 with odd k.
    static void decode(const u8* const* rows, Table t, Vec* out) {
        for (int g = 0; g < 2; ++g) {
            __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[0] + 16 * g)));
            out[2 * g] = _mm512_permutexvar_ps(_mm512_srli_epi32(b, 4), t);
            out[2 * g + 1] = _mm512_permutexvar_ps(b, t);
        }
    }
    static void decode2(const u8* const* rows, const float* scale, Float round, Vec* first, Vec* second) {
        decode(rows, table(scale, round), first);
        decode(rows + 1, table(scale + 1, round), second);
    }
    static void lay_out(const void* x, Float type, E* out) {
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        for (int g = 0; g < 2; ++g) {
            __m512 a = load16(x, 32 * g, type), b = load16(x, 32 * g + 16, type);
            store(out + 32 * g, _mm512_permutex2var_ps(a, even, b));
            store(out + 32 * g + 16, _mm512_permutex2var_ps(a, odd, b));
        }
    }
    static void place(const float (*natural)[kUnit], Vec* out) {
        float ordered[kUnit];
        lay_out(natural[0], Float::f32, ordered);
        for (int i = 0; i < 4; ++i) out[i] = load(ordered + 16 * i);
    }
    static void natural(const float* c, float* out) {
        const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        for (int g = 0; g < 2; ++g) {
            __m512 even = load(c + 32 * g), odd = load(c + 32 * g + 16);
            store(out + 32 * g, _mm512_permutex2var_ps(even, first, odd));
            store(out + 32 * g + 16, _mm512_permutex2var_ps(even, second, odd));
        }
    }
    static Vec columns(Vec v) { return v; }
    static void convert(const void* x, Float type, i64 n, i64 padded, E* out) {
        i64 i = 0;
        for (; i + 16 <= n; i += 16) store(out + i, load16(x, i, type));
        for (; i < n; ++i) out[i] = load_one(x, i, type);
        for (; i < padded; ++i) out[i] = 0;
    }
    static void store_row(const float* v, const float* bias, i64 n, void* out, Float type) { store_rounded(v, bias, n, out, type); }
};

}  // namespace
}  // namespace fourscore::FOURSCORE_ISA
