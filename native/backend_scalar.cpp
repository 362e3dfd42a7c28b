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
    using Few = Ops;
    using Acc = Four;
    static constexpr int kWidth = 4, kLanes = 4, kPer = 1, kRows = 2, kFewRows = 2;
    static constexpr i64 kChunkUnits = 8;

    static Vec load(const E* p) {
        Vec v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    static Vec load_x(const E* p) { return load(p); }
    static void store(E* p, Vec v) { std::memcpy(p, &v, sizeof v); }
    static Acc zero() { return Acc{0, 0, 0, 0}; }
    static Acc fma(Acc a, Vec x, Vec w) { return a + x * w; }
    static Acc load_acc(const float* p) { return load(p); }
    static void store_acc(float* p, Acc a) { store(p, a); }
    static Vec spread(const E* d, i64 s) { return Vec{d[s], d[s], d[s], d[s]}; }

    template <int R, int J>
    static void sums(const Acc (&a)[R][J], float* out) {
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < J; ++j) out[i * J + j] = (a[i][j][0] + a[i][j][2]) + (a[i][j][1] + a[i][j][3]);
    }
    static void scales(const Weight& w, i64 first, i64 count, float* out) {
        for (i64 i = 0; i < count; ++i) out[i] = scale_of(w, first + i);
    }
    template <int N>
    static void store_outputs(const float* v, const float* bias, void* out, Float type) {
        store_row(v, bias, N, out, type);
    }

    struct Table {
        float value[16];
    };
    static Table table(const float* scale, Float round) {
        Table t;
        for (int i = 0; i < 16; ++i) t.value[i] = rounded(kValues[i] * *scale, round);
        return t;
    }
    static void decode(const u8* const* rows, const Table& t, Vec* out) {
        const u8* bytes = rows[0];
        for (int i = 0; i < 16; ++i) {
            u8 a = bytes[2 * i], b = bytes[2 * i + 1];
            out[i] = Vec{t.value[a >> 4], t.value[a & 15], t.value[b >> 4], t.value[b & 15]};
        }
    }
    static void decode2(const u8* const* rows, const float* scale, Float round, Vec* first, Vec* second) {
        decode(rows, table(scale, round), first);
        decode(rows + 1, table(scale + 1, round), second);
    }
    static void place(const float (*natural)[kUnit], Vec* out) {
        for (int i = 0; i < 16; ++i) out[i] = load(natural[0] + 4 * i);
    }
    static void lay_out(const void* x, Float type, E* out) {
        for (i64 i = 0; i < kUnit; ++i) out[i] = load_one(x, i, type);
    }
    static void natural(const float* c, float* out) { std::memcpy(out, c, kUnit * sizeof(float)); }
    static Vec columns(Vec v) { return v; }
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
