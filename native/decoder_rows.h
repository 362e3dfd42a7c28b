// A decoder's steps on one row: norm, activation, rotary embedding, sums.
#pragma once

#include <cmath>

#include "decoder_kernels.h"
#include "vec.h"

namespace fourscore::FOURSCORE_ISA {
namespace {

// f(first value, count) over n values, the last vector cut.
template <class Body>
static inline void by_vectors(i64 n, const Body& body) {
    i64 i = 0;
    for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
    if (i < n) body(i, n - i);
}
template <Float T>
static inline Vec take(const void* p, i64 i, i64 count) {
    return count == kLanes ? load<T>(p, i) : load_some<T>(p, i, count);
}
template <Float T>
static inline void give(void* p, i64 i, i64 count, Vec v) {
    if (count == kLanes)
        store<T>(p, i, v);
    else
        store_some<T>(p, i, count, v);
}
template <Float T>
static inline Vec rounded_to(Vec v) {
    return T == Float::bf16 ? widen(narrow(v)) : v;
}
static inline Vec tangent(Vec x) { return 1.0f - 2.0f / (exponential(x + x) + 1.0f); }

void scale_row(const void* x, float by, i64 n, Float type, void* y) {
    with_type(type, [&]<Float T>() { by_vectors(n, [&](i64 i, i64 count) { give<T>(y, i, count, take<T>(x, i, count) * by); }); });
}

void norm_row(const void* x, const Norm& norm, i64 n, Float type, void* y) {
    with_type(type, [&]<Float T>() {
        Vec squares{};
        by_vectors(n, [&](i64 i, i64 count) {
            Vec v = take<T>(x, i, count);
            squares = fma(v, v, squares);
        });
        float scale = 1.0f / std::sqrt(add_up(squares) / static_cast<float>(n) + norm.epsilon);
        by_vectors(n, [&](i64 i, i64 count) {
            Vec unit = take<T>(x, i, count) * scale;
            if (norm.round_first) unit = rounded_to<T>(unit);
            give<T>(y, i, count, take<Float::f32>(norm.weight, i, count) * unit);
        });
    });
}

void add_row(const void* x, i64 n, Float type, void* y) {
    with_type(type, [&]<Float T>() { by_vectors(n, [&](i64 i, i64 count) { give<T>(y, i, count, take<T>(y, i, count) + take<T>(x, i, count)); }); });
}

void gate_row(const void* gate, const void* up, Activation activation, i64 n, Float type, void* y) {
    with_type(type, [&]<Float T>() {
        if (activation == Activation::silu) {
            by_vectors(n, [&](i64 i, i64 count) {
                Vec g = take<T>(gate, i, count);
                give<T>(y, i, count, g * sigmoid(g) * take<T>(up, i, count));
            });
        } else {
            by_vectors(n, [&](i64 i, i64 count) {
                Vec g = take<T>(gate, i, count);
                Vec inner = 0.7978845608f * fma(0.044715f * g * g, g, g);
                give<T>(y, i, count, 0.5f * g * (1.0f + tangent(inner)) * take<T>(up, i, count));
            });
        }
    });
}

void rope_row(void* head, const float* cos, const float* sin, i64 rotary, Float type) {
    i64 half = rotary / 2;
    with_type(type, [&]<Float T>() {
        by_vectors(half, [&](i64 i, i64 count) {
            Vec low = take<T>(head, i, count), high = take<T>(head, half + i, count);
            Vec c = take<Float::f32>(cos, i, count), s = take<Float::f32>(sin, i, count);
            give<T>(head, i, count, rounded_to<T>(low * c) + rounded_to<T>(high * -s));
            give<T>(head, half + i, count, rounded_to<T>(high * c) + rounded_to<T>(low * s));
        });
    });
}

void cap_row(float* x, i64 n, float cap) {
    by_vectors(n, [&](i64 i, i64 count) { give<Float::f32>(x, i, count, cap * tangent(take<Float::f32>(x, i, count) / cap)); });
}

}  // namespace
}  // namespace fourscore::FOURSCORE_ISA
