// Operations of one pass over memory: SwiGLU, RMS norm, rotary embedding, cross-entropy over a vocabulary.
#pragma once

#include <cmath>

#include "ops.h"
#include "vec.h"

namespace fourscore::FOURSCORE_ISA {
namespace {

constexpr i64 kAlone = 1 << 15;  // values under which waking a thread costs more than it brings
constexpr i64 kShare = 1 << 13;  // values a thread takes at a time

static inline int threads_for(i64 values, int threads) { return values < kAlone ? 1 : threads; }

// Runs body(first, end) over [0, n) in shares.
template <class Body>
static inline void over(i64 n, i64 share, int threads, const Body& body) {
    struct Job {
        const Body& body;
        i64 n, share;
    } job{body, n, share};
    run(
        threads, ceil_div(n, share),
        [](void* p, i64 task) {
            const Job& j = *static_cast<const Job*>(p);
            j.body(task * j.share, least(j.n, (task + 1) * j.share));
        },
        &job);
}

void swiglu(const void* gate, const void* up, Float type, i64 n, void* y, int threads) {
    with_type(type, [&]<Float T>() {
        over(n, kShare, threads_for(n, threads), [&](i64 first, i64 end) {
            auto value = [](Vec g, Vec u) { return g * sigmoid(g) * u; };
            i64 i = first;
            for (; i + kLanes <= end; i += kLanes) store<T>(y, i, value(load<T>(gate, i), load<T>(up, i)));
            if (i < end) store_some<T>(y, i, end - i, value(load_some<T>(gate, i, end - i), load_some<T>(up, i, end - i)));
        });
    });
}

void swiglu_backward(const void* dy, const void* gate, const void* up, Float type, i64 n, void* dgate, void* dup, int threads) {
    with_type(type, [&]<Float T>() {
        over(n, kShare, threads_for(n, threads), [&](i64 first, i64 end) {
            auto slopes = [](Vec d, Vec g, Vec u, Vec& dg, Vec& du) {
                Vec s = sigmoid(g), silu = g * s;
                dg = d * u * (s + silu * (1.0f - s));
                du = d * silu;
            };
            i64 i = first;
            Vec dg, du;
            for (; i + kLanes <= end; i += kLanes) {
                slopes(load<T>(dy, i), load<T>(gate, i), load<T>(up, i), dg, du);
                store<T>(dgate, i, dg);
                store<T>(dup, i, du);
            }
            if (i < end) {
                i64 count = end - i;
                slopes(load_some<T>(dy, i, count), load_some<T>(gate, i, count), load_some<T>(up, i, count), dg, du);
                store_some<T>(dgate, i, count, dg);
                store_some<T>(dup, i, count, du);
            }
        });
    });
}

void norm(const void* x, const void* weight, Float type, i64 rows, i64 n, float epsilon, void* y, float* scale, int threads) {
    with_type(type, [&]<Float T>() {
        over(rows, most(1, kShare / n), threads_for(rows * n, threads), [&](i64 first, i64 end) {
            for (i64 row = first; row < end; ++row) {
                const void* from = at(x, row * n, type);
                void* to = at(y, row * n, type);
                Vec squares{};
                each_vector<T>(n, [&](i64 i, i64 count) {
                    Vec v = load_up_to<T>(from, i, count);
                    squares = fma(v, v, squares);
                });
                scale[row] = 1.0f / std::sqrt(add_up(squares) / static_cast<float>(n) + epsilon);
                each_vector<T>(n, [&](i64 i, i64 count) {
                    Vec unit = round_to<T>(load_up_to<T>(from, i, count) * scale[row]);
                    store_up_to<T>(to, i, count, load_up_to<T>(weight, i, count) * unit);
                });
            }
        });
    });
}

void norm_backward(const void* dy, const void* x, const void* weight, const float* scale, Float type, i64 rows, i64 n, void* dx,
                   int threads) {
    with_type(type, [&]<Float T>() {
        over(rows, most(1, kShare / n), threads_for(rows * n, threads), [&](i64 first, i64 end) {
            for (i64 row = first; row < end; ++row) {
                const void *grown = at(dy, row * n, type), *from = at(x, row * n, type);
                void* to = at(dx, row * n, type);
                auto weighted = [&](i64 i, i64 count) { return load_up_to<T>(grown, i, count) * load_up_to<T>(weight, i, count); };
                Vec products{};
                each_vector<T>(n, [&](i64 i, i64 count) { products = fma(weighted(i, count), load_up_to<T>(from, i, count), products); });
                float s = scale[row], along = add_up(products) / static_cast<float>(n) * s * s;
                each_vector<T>(n, [&](i64 i, i64 count) {
                    store_up_to<T>(to, i, count, (weighted(i, count) - load_up_to<T>(from, i, count) * along) * s);
                });
            }
        });
    });
}

void rope(const Heads& x, const void* cos, const void* sin, i64 cos_batch, Float type, i64 batch, i64 heads, i64 places, i64 d, int back,
          const Heads& y, int threads) {
    i64 half = d / 2;
    with_type(type, [&]<Float T>() {
        over(batch * places, most(1, kShare / (heads * d)), threads_for(batch * places * heads * d, threads), [&](i64 first, i64 end) {
            for (i64 row = first; row < end; ++row) {
                i64 b = row / places, t = row % places;
                const void *c = at(cos, b * cos_batch + t * d, type), *s = at(sin, b * cos_batch + t * d, type);
                for (i64 h = 0; h < heads; ++h) {
                    const void* from = at(x.data, b * x.batch + h * x.head + t * x.place, type);
                    void* to = at(y.data, b * y.batch + h * y.head + t * y.place, type);
                    each_vector<T>(half, [&](i64 i, i64 count) {
                        Vec low = load_up_to<T>(from, i, count), high = load_up_to<T>(from, half + i, count);
                        Vec cl = load_up_to<T>(c, i, count), ch = load_up_to<T>(c, half + i, count);
                        Vec sl = load_up_to<T>(s, i, count), sh = load_up_to<T>(s, half + i, count);
                        Vec to_low = round_to<T>(high * (back ? sh : -sl)), to_high = round_to<T>(low * (back ? -sl : sh));
                        store_up_to<T>(to, i, count, round_to<T>(low * cl) + to_low);
                        store_up_to<T>(to, half + i, count, round_to<T>(high * ch) + to_high);
                    });
                }
            }
        });
    });
}

void nats(void* logits, Float type, i64 rows, i64 n, const i64* targets, float* losses, int gradient, int threads) {
    with_type(type, [&]<Float T>() {
        over(rows, most(1, kShare / n), threads_for(rows * n, threads), [&](i64 first, i64 end) {
            const float never = -__builtin_inff();
            for (i64 row = first; row < end; ++row) {
                void* p = at(logits, row * n, type);
                Vec top = all(never);
                each_vector<T>(n, [&](i64 i, i64 count) { top = larger(load_up_to<T>(p, i, count, never), top); });
                const Vec most_ = all(largest(top));
                Vec sum{};
                each_vector<T>(n, [&](i64 i, i64 count) { sum += exponential(load_up_to<T>(p, i, count, never) - most_); });
                float normaliser = most_[0] + std::log(add_up(sum));
                losses[row] = normaliser - load_one(p, targets[row], type);
                if (!gradient) continue;
                float wanted = std::exp(load_one(p, targets[row], type) - normaliser) - 1.0f;
                each_vector<T>(n, [&](i64 i, i64 count) {
                    store_up_to<T>(p, i, count, exponential(load_up_to<T>(p, i, count, never) - normaliser));
                });
                store_one(p, targets[row], type, wanted);
            }
        });
    });
}

}  // namespace
}  // namespace fourscore::FOURSCORE_ISA
