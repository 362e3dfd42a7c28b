// NEON, which every aarch64 machine has. Products in f32 by fused multiply-adds; for bf16 and f16 inputs the decoded weights are
// rounded to that type first, as a dense layer's would be. Units stay in natural order: a nibble pair is two neighbours.
#define FOURSCORE_ISA neon
#include <arm_neon.h>

#include "codec.h"
#include "linear.h"

namespace fourscore::neon {
namespace {

static inline float32x4_t load4(const void* x, i64 i, Float type) {
    float32x4_t f;
    if (type == Float::f32) {
        std::memcpy(&f, static_cast<const char*>(x) + 4 * i, sizeof f);
        return f;
    }
    uint16x4_t h;
    std::memcpy(&h, static_cast<const char*>(x) + 2 * i, sizeof h);
    return type == Float::f16 ? vcvt_f32_f16(vreinterpret_f16_u16(h)) : vreinterpretq_f32_u32(vshll_n_u16(h, 16));
}

// To nearest even; NaN stays NaN.
static inline uint16x4_t half4(float32x4_t f, Float type) {
    if (type == Float::f16) return vreinterpret_u16_f16(vcvt_f16_f32(f));
    uint32x4_t b = vreinterpretq_u32_f32(f);
    uint32x4_t odd = vandq_u32(vshrq_n_u32(b, 16), vdupq_n_u32(1));
    uint32x4_t r = vaddq_u32(b, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(f, f), r, vdupq_n_u32(0x7fc00000)), 16);
}

static inline void store4(void* out, i64 i, Float type, float32x4_t f) {
    if (type == Float::f32) {
        std::memcpy(static_cast<char*>(out) + 4 * i, &f, sizeof f);
    } else {
        uint16x4_t h = half4(f, type);
        std::memcpy(static_cast<char*>(out) + 2 * i, &h, sizeof h);
    }
}

static inline float32x4_t round4(float32x4_t f, Float type) {
    if (type == Float::f32) return f;
    uint16x4_t h = half4(f, type);
    return load4(&h, 0, type);
}

// 16 bytes of codes in order: those of the high nibbles at even places.
static inline uint8x16x2_t codes_of(const u8* bytes) {
    uint8x16_t b = vld1q_u8(bytes);
    return vzipq_u8(vshrq_n_u8(b, 4), vandq_u8(b, vdupq_n_u8(15)));
}

// The 16 values a code can have, taken apart into their bytes: each plane is one register, which `tbl` looks 16 codes up in.
struct Table {
    uint8x16_t plane[4];
};
static inline Table planes(const float32x4_t* values) {
    uint8x16_t v[4];
    for (int i = 0; i < 4; ++i) v[i] = vreinterpretq_u8_f32(values[i]);
    uint8x16_t even01 = vuzp1q_u8(v[0], v[1]), odd01 = vuzp2q_u8(v[0], v[1]), even23 = vuzp1q_u8(v[2], v[3]), odd23 = vuzp2q_u8(v[2], v[3]);
    return {{vuzp1q_u8(even01, even23), vuzp1q_u8(odd01, odd23), vuzp2q_u8(even01, even23), vuzp2q_u8(odd01, odd23)}};
}
static inline Table table_of(float scale, Float round) {
    float32x4_t values[4];
    for (int i = 0; i < 4; ++i) values[i] = round4(vmulq_n_f32(vld1q_f32(kValues + 4 * i), scale), round);
    return planes(values);
}
static inline void look_up(uint8x16_t codes, const Table& t, float32x4_t* out) {
    uint8x16x2_t low = vzipq_u8(vqtbl1q_u8(t.plane[0], codes), vqtbl1q_u8(t.plane[1], codes));
    uint8x16x2_t high = vzipq_u8(vqtbl1q_u8(t.plane[2], codes), vqtbl1q_u8(t.plane[3], codes));
    for (int h = 0; h < 2; ++h) {
        uint16x8x2_t z = vzipq_u16(vreinterpretq_u16_u8(low.val[h]), vreinterpretq_u16_u8(high.val[h]));
        out[2 * h] = vreinterpretq_f32_u16(z.val[0]);
        out[2 * h + 1] = vreinterpretq_f32_u16(z.val[1]);
    }
}

struct Codec : PlainCodec {
    static void expand(const u8* packed, i64 bytes, float scale, void* out, Float type) {
        const Table table = table_of(scale, type);
        i64 done = 0;
        for (; done + 16 <= bytes; done += 16) {
            uint8x16x2_t codes = codes_of(packed + done);
            for (int h = 0; h < 2; ++h) {
                float32x4_t v[4];
                look_up(codes.val[h], table, v);
                for (int i = 0; i < 4; ++i) store4(out, 2 * done + 16 * h + 4 * i, type, v[i]);
            }
        }
        PlainCodec::expand(packed + done, bytes - done, scale, at(out, 2 * done, type), type);
    }
};

struct Ops {
    using E = float;
    using Vec = float32x4_t;
    using Few = Ops;
    using Acc = float32x4_t;
    // 24 sums, 4 vectors of W and one of x: 29 of 32 registers.
    static constexpr int kWidth = 4, kLanes = 4, kPer = 1, kRows = 6, kFewRows = 4;
    static constexpr i64 kChunkUnits = 8;

    static Vec load(const E* p) { return vld1q_f32(p); }
    static Vec load_x(const E* p) { return load(p); }
    static void store(E* p, Vec v) { vst1q_f32(p, v); }
    static Acc zero() { return vdupq_n_f32(0); }
    static Acc fma(Acc a, Vec x, Vec w) { return vfmaq_f32(a, x, w); }
    static Acc load_acc(const float* p) { return vld1q_f32(p); }
    static void store_acc(float* p, Acc a) { vst1q_f32(p, a); }
    static Vec spread(const E* d, i64 s) { return vld1q_dup_f32(d + s); }

    template <int R, int J>
    static void sums(const Acc (&a)[R][J], float* out) {
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < J; j += 4) {
                const Acc* s = a[i] + j;
                store(out + i * J + j, vpaddq_f32(vpaddq_f32(s[0], s[1]), vpaddq_f32(s[2], s[3])));
            }
    }
    static void scales(const Weight& w, i64 first, i64 count, float* out) {
        for (i64 i = 0; i < count; ++i) out[i] = scale_of(w, first + i);
    }
    template <int N>
    static void store_outputs(const float* values, const float* bias, void* out, Float type) {
        for (int i = 0; i < N; i += 4) {
            float32x4_t v = load(values + i);
            store4(out, i, type, bias ? vaddq_f32(v, load(bias + i)) : v);
        }
    }

    static Table table(const float* scale, Float round) { return table_of(*scale, round); }
    static void decode(const u8* const* rows, const Table& t, Vec* out) {
        for (int g = 0; g < 2; ++g) {
            uint8x16x2_t codes = codes_of(rows[0] + 16 * g);
            look_up(codes.val[0], t, out + 8 * g);
            look_up(codes.val[1], t, out + 8 * g + 4);
        }
    }
    static void decode2(const u8* const* rows, const float* scale, Float round, Vec* first, Vec* second) {
        decode(rows, table(scale, round), first);
        decode(rows + 1, table(scale + 1, round), second);
    }
    static void lay_out(const void* x, Float type, E* out) {
        for (i64 i = 0; i < kUnit; i += 4) store(out + i, load4(x, i, type));
    }
    static void place(const float (*natural)[kUnit], Vec* out) {
        for (int i = 0; i < 16; ++i) out[i] = load(natural[0] + 4 * i);
    }
    static void natural(const float* c, float* out) { std::memcpy(out, c, kUnit * sizeof(float)); }
    static Vec columns(Vec v) { return v; }
    static void convert(const void* x, Float type, i64 n, i64 padded, E* out) {
        i64 i = 0;
        for (; i + 4 <= n; i += 4) store(out + i, load4(x, i, type));
        for (; i < n; ++i) out[i] = load_one(x, i, type);
        for (; i < padded; ++i) out[i] = 0;
    }
    static void store_row(const float* values, const float* bias, i64 n, void* out, Float type) {
        i64 i = 0;
        for (; i + 4 <= n; i += 4) {
            float32x4_t v = load(values + i);
            store4(out, i, type, bias ? vaddq_f32(v, load(bias + i)) : v);
        }
        for (; i < n; ++i) store_one(out, i, type, bias ? values[i] + bias[i] : values[i]);
    }
};

}  // namespace
}  // namespace fourscore::neon

namespace fourscore {
const Backend kNeon{"neon", neon::quantize<neon::Codec>, neon::dequantize<neon::Codec>, neon::forward<neon::Ops>, neon::backward<neon::Ops>};
}
