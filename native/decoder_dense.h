// y = x W^T + bias, W dense. An output's sum runs over k lane by lane, then over lanes: the same for any number of rows.
#pragma once

#include "decoder_attention.h"

namespace fourscore::FOURSCORE_ISA {
namespace {

#if defined(__AVX512BF16__)
struct DenseHalf {
    static constexpr i64 kStep = 32;
    using Operand = __m512i;
    static Operand operand(const void* p, i64 i) { return _mm512_loadu_si512(static_cast<const u16*>(p) + i); }
    static Operand some(const void* p, i64 i, i64 count) {
        return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((u32{1} << count) - 1), static_cast<const u16*>(p) + i);
    }
    static Vec multiply_add(Vec acc, Operand a, Operand b) { return Half::multiply_add(acc, a, b); }
};
#else
struct DenseHalf {
    static constexpr i64 kStep = kLanes;
    using Operand = Vec;
    static Operand operand(const void* p, i64 i) { return load<Float::bf16>(p, i); }
    static Operand some(const void* p, i64 i, i64 count) { return load_some<Float::bf16>(p, i, count); }
    static Vec multiply_add(Vec acc, Operand a, Operand b) { return fma(a, b, acc); }
};
#endif
struct DensePlain {
    static constexpr i64 kStep = kLanes;
    using Operand = Vec;
    static Operand operand(const void* p, i64 i) { return load<Float::f32>(p, i); }
    static Operand some(const void* p, i64 i, i64 count) { return load_some<Float::f32>(p, i, count); }
    static Vec multiply_add(Vec acc, Operand a, Operand b) { return fma(a, b, acc); }
};

template <class D>
static void dense_rows(const void* w, i64 outputs, i64 cols, const void* x, i64 m, i64 x_stride, Float type, const float* bias, void* y,
                       i64 y_stride, Float y_type) {
    constexpr int kOutputs = 4;
    i64 whole = cols / D::kStep * D::kStep;
    for (i64 n = 0; n < outputs; n += kOutputs) {
        const void* b[kOutputs];
        for (int j = 0; j < kOutputs; ++j) b[j] = at(w, least(n + j, outputs - 1) * cols, type);
        for (i64 i = 0; i < m; i += kTogether)
            with_count<kTogether>(least(kTogether, m - i), [&]<int R>() {
                const void* a[R];
                for (int r = 0; r < R; ++r) a[r] = at(x, (i + r) * x_stride, type);
                Vec acc[R][kOutputs] = {};
                auto step = [&](auto&& operand) {
                    typename D::Operand v[kOutputs];
                    for (int j = 0; j < kOutputs; ++j) v[j] = operand(b[j]);
                    for (int r = 0; r < R; ++r) {
                        typename D::Operand u = operand(a[r]);
                        for (int j = 0; j < kOutputs; ++j) acc[r][j] = D::multiply_add(acc[r][j], u, v[j]);
                    }
                };
                for (i64 k = 0; k < whole; k += D::kStep) {
                    if (i == 0)
                        for (int j = 0; j < kOutputs; ++j)  // a row alone is too short a stream for the machine to foresee the next
                            __builtin_prefetch(static_cast<const char*>(b[j]) + (kOutputs * cols + k) * width(type), 0, 2);
                    step([&](const void* p) { return D::operand(p, k); });
                }
                if (whole < cols) step([&](const void* p) { return D::some(p, whole, cols - whole); });
                for (int r = 0; r < R; ++r)
                    for (int j = 0; j < least(kOutputs, outputs - n); ++j) {
                        float sum = add_up(acc[r][j]);
                        store_one(y, (i + r) * y_stride + n + j, y_type, bias ? sum + bias[n + j] : sum);
                    }
            });
    }
}

void dense(const void* w, i64 outputs, i64 cols, const void* x, i64 m, i64 x_stride, Float type, const float* bias, void* y, i64 y_stride,
           Float y_type) {
    if (type == Float::bf16)
        dense_rows<DenseHalf>(w, outputs, cols, x, m, x_stride, type, bias, y, y_stride, y_type);
    else
        dense_rows<DensePlain>(w, outputs, cols, x, m, x_stride, type, bias, y, y_stride, y_type);
}

void add_low_rank(const float* x, const void* b, i64 rank, i64 b_stride, float scale, i64 m, i64 n, Float type, void* y) {
    with_type(type, [&]<Float T>() {
        for (i64 r = 0; r < m; ++r) {
            void* to = at(y, r * n, type);
            by_vectors(n, [&](i64 i, i64 count) {
                Vec sum{};
                for (i64 k = 0; k < rank; ++k) sum = fma(all(x[r * rank + k]), take<T>(b, k * b_stride + i, count), sum);
                give<T>(to, i, count, fma(sum, all(scale), take<T>(to, i, count)));
            });
        }
    });
}

}  // namespace
}  // namespace fourscore::FOURSCORE_ISA
