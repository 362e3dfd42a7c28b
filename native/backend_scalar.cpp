// Plain C++ for any machine: four lanes that a compiler turns into whatever vectors the platform has.
#define FOURSCORE_ISA scalar
#include "codec.h"
#include "linear.h"

namespace fourscore::scalar {
namespace {

typedef float Four __attribute__((vector_size(16), aligned(4)));

struct Ops {
    using E = float;
    using Vec = Four;
    using Acc = Four;
    static constexpr int kWidth = 4, kLanes = 4, kRows = 2, kStep = 1;
    static constexpr i64 kChunkUnits = 8;

    static Vec load(const E* p) {
        Vec v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    static void store(E* p, Vec v) { std::memcpy(p, &v, sizeof v); }
    static Acc zero() { return Acc{0, 0, 0, 0}; }
    static Acc fma(Acc a, Vec x, Vec w) { return a + x * w; }
    static Acc load_acc(const float* p) { return load(p); }
    static void store_acc(float* p, Acc a) { store(p, a); }
    static Vec spread(const E* d, i64 s) { return Vec{d[s], d[s], d[s], d[s]}; }

    static void sum4(const Acc* a, float* c, bool add) {
        for (int j = 0; j < 4; ++j) {
            float s = (a[j][0] + a[j][2]) + (a[j][1] + a[j][3]);
            c[j] = add ? c[j] + s : s;
        }
    }

    struct Table {
        float value[16];
    };
    static Table table(float scale, Float round) {
        Table t;
        for (int i = 0; i < 16; ++i) t.value[i] = rounded(kValues[i] * scale, round);
        return t;
    }
    static void decode(const u8* bytes, const Table& t, Vec* out) {
        for (int i = 0; i < 16; ++i) {
            u8 a = bytes[2 * i], b = bytes[2 * i + 1];
            out[i] = Vec{t.value[a >> 4], t.value[a & 15], t.value[b >> 4], t.value[b & 15]};
        }
    }
    static void permute(const float* natural, E* out) { std::memcpy(out, natural, kUnit * sizeof(float)); }
    static void permute_from(const void* x, Float type, E* out) {
        for (i64 i = 0; i < kUnit; ++i) out[i] = load_one(x, i, type);
    }
    static void unpermute(const float* c, float* natural) { std::memcpy(natural, c, kUnit * sizeof(float)); }
    static void interleave(const E* row, const E*, Vec* out) {
        for (int i = 0; i < 16; ++i) out[i] = load(row + 4 * i);
    }
    static void convert(const void* x, Float type, i64 n, i64 padded, E* out) {
        for (i64 i = 0; i < n; ++i) out[i] = load_one(x, i, type);
        for (i64 i = n; i < padded; ++i) out[i] = 0;
    }
    static void store_row(const float* values, const float* bias, i64 n, void* out, Float type) {
        for (i64 i = 0; i < n; ++i) store_one(out, i, type, bias ? values[i] + bias[i] : values[i]);
    }
};

}  // namespace
}  // namespace fourscore::scalar

namespace fourscore {
const Backend kScalar{"scalar", scalar::quantize<scalar::PlainCodec>, scalar::dequantize<scalar::PlainCodec>,
                      scalar::forward<scalar::Ops>, scalar::backward<scalar::Ops>};
}
