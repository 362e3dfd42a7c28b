// Elementwise operations and those over rows: SwiGLU.
#pragma once

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

}  // namespace
}  // namespace fourscore::FOURSCORE_ISA
