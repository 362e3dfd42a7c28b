// What a training step computes beside its linear layers: one table of functions an instruction set. Tensors are f32 or bf16
// (`Float`), sums are made in f32 in one fixed order, and work is divided without regard to the number of threads: the same
// bits for any. Strides are in elements.
#pragma once

#include <cstdint>

#include "nf4.h"

namespace fourscore {

// Values [b, h, t, d] with strides in elements; those of one head at one place lie together.
struct Heads {
    void* data;
    std::int64_t batch, head, place;
};

// `heads` query heads, `groups` key heads, heads a multiple of groups; `width` values each.
struct Attention {
    std::int64_t batch, heads, groups, queries, keys, width;
    float scale;
    Float type;
};

// y[m, n] = scale * a[m, k] b + bias, and `add`: added to what y holds; rounded once. a[i, s] lies at a_row * i + a_step * s, b as the
// weight of a linear layer: b[j, s] at b_row * j + b_step * s, y[i, j] at y_row * i + y_column * j. One of a's strides is 1, and
// one of b's. b is rounded to a's type. bias: f32 [n], or null.
struct Product {
    std::int64_t m, n, k;
    const void* a;
    std::int64_t a_row, a_step;
    Float a_type;
    const void* b;
    std::int64_t b_row, b_step;
    Float b_type;
    void* y;
    std::int64_t y_row, y_column;
    Float y_type;
    float scale;
    const float* bias;
    bool add;
};

struct Operations {
    const char* name;
    void (*product)(const Product&, int threads);
    // y[n] = silu(gate) * up, rounded once.
    void (*swiglu)(const void* gate, const void* up, Float type, std::int64_t n, void* y, int threads);
    // dgate and dup [n], from dy. Either may be the same memory as any of the inputs.
    void (*swiglu_backward)(const void* dy, const void* gate, const void* up, Float type, std::int64_t n, void* dgate, void* dup,
                            int threads);
    // y[rows, n] = weight * (x / rms(x)), rounded before the product and after; scale[rows] = 1 / rms(x).
    void (*norm)(const void* x, const void* weight, Float type, std::int64_t rows, std::int64_t n, float epsilon, void* y,
                 float* scale, int threads);
    void (*norm_backward)(const void* dy, const void* x, const void* weight, const float* scale, Float type, std::int64_t rows,
                          std::int64_t n, void* dx, int threads);
    // Each place's angles, cos and sin [batch or 1, places, d], turn both halves of every head; products are rounded before their
    // sum. y may not be x. cos_batch: stride of the angles' batch, 0 where all rows share them. Back: the transposed turn.
    void (*rope)(const Heads& x, const void* cos, const void* sin, std::int64_t cos_batch, Float type, std::int64_t batch,
                 std::int64_t heads, std::int64_t places, std::int64_t d, int back, const Heads& y, int threads);
    // losses[rows] = log(sum(exp(logits))) - logits[target]; with `gradient` the logits [rows, n] become soft-max minus one-hot.
    void (*nats)(void* logits, Float type, std::int64_t rows, std::int64_t n, const std::int64_t* targets, float* losses, int gradient,
                 int threads);
    // Causal; query i stands at place keys - queries + i. normaliser[b, h, t] = log of the sum of exponentials.
    void (*attention)(const Attention&, const Heads& q, const Heads& k, const Heads& v, const Heads& out, float* normaliser, int threads);
    void (*attention_backward)(const Attention&, const Heads& q, const Heads& k, const Heads& v, const Heads& out, const float* normaliser,
                               const Heads& dout, const Heads& dq, const Heads& dk, const Heads& dv, int threads);
};

extern const Operations kScalarOperations;
#ifdef FOURSCORE_X86
extern const Operations kAvx2Operations;
extern const Operations kAvx512Operations;
extern const Operations kAvx512Bf16Operations;
#endif

}  // namespace fourscore
