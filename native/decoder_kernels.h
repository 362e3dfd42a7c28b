// What a decoder's forward pass computes beside its 4-bit layers: one table of functions an instruction set. All of them work on
// the calling thread; who calls them for what is native/decoder.cpp's business. A row's result never depends on other rows.
#pragma once

#include <cstdint>

#include "nf4.h"

namespace fourscore {

constexpr std::int64_t kPage = 16;       // tokens in a page of the cache
constexpr std::int64_t kAttendRows = 48;  // rows (a place and a head of the group) that `attend` takes at most

// weight null: no norm. round_first: x / rms(x) is rounded before the product with the weight (Gemma rounds only after it).
struct Norm {
    const float* weight = nullptr;
    float epsilon = 0;
    bool round_first = true;
};

enum class Activation : int { silu = 0, gelu_tanh = 1 };

// The heads of one key group: `each` query heads of `width` values. window: keys that a query sees, its own among them (0: all).
// cap: scores become cap * tanh(score / cap) (0: they stay).
struct Group {
    std::int64_t each, width, window;
    float scale, cap;
    Float type;
};

// One group's keys and values of one layer in every page: page table entries are addresses, these are offsets in bytes.
struct Pages {
    const std::int64_t* table;
    std::int64_t keys, values;
};

struct DecoderKernels {
    const char* name;
    // Bytes that keys, and values, of one group and layer take in a page.
    std::int64_t (*keys_bytes)(std::int64_t width, Float type);
    std::int64_t (*values_bytes)(std::int64_t width, Float type);
    // y[n] = x[n] * by.
    void (*scale)(const void* x, float by, std::int64_t n, Float type, void* y);
    // y may be x.
    void (*norm)(const void* x, const Norm&, std::int64_t n, Float type, void* y);
    // y[n] += x[n].
    void (*add)(const void* x, std::int64_t n, Float type, void* y);
    // y[n] = activation(gate[n]) * up[n], rounded once; y may be either.
    void (*gate)(const void* gate, const void* up, Activation, std::int64_t n, Float type, void* y);
    // Turns the first `rotary` values of a head by angles whose cos and sin [rotary / 2] are given; products are rounded before their sum.
    void (*rope)(void* head, const float* cos, const float* sin, std::int64_t rotary, Float type);
    // One token's key and value of a group into its page.
    void (*store)(const void* key, const void* value, std::int64_t width, Float type, const Pages&, std::int64_t place);
    // Rows first .. first + rows - 1 of a group, row r being head r % each of the query at place start + r / each: softmax over its
    // keys times their values. q and out: first head of the group at `start`; strides from place to place, in elements.
    void (*attend)(const Group&, const Pages&, const void* q, std::int64_t q_stride, std::int64_t start, std::int64_t first, std::int64_t rows,
                   void* out, std::int64_t out_stride);
    // y[m, outputs] = x[m, cols] w[outputs, cols]^T + bias; x and w of one type, y of another or the same; strides in elements.
    void (*dense)(const void* w, std::int64_t outputs, std::int64_t cols, const void* x, std::int64_t m, std::int64_t x_stride, Float type,
                  const float* bias, void* y, std::int64_t y_stride, Float y_type);
    // y[m, n] += scale * x[m, rank] b, b [rank, n] with rows b_stride apart; x f32, the sum rounded once.
    void (*add_low_rank)(const float* x, const void* b, std::int64_t rank, std::int64_t b_stride, float scale, std::int64_t m, std::int64_t n,
                         Float type, void* y);
    // x[n] = cap * tanh(x[n] / cap).
    void (*cap)(float* x, std::int64_t n, float cap);
};

extern const DecoderKernels kScalarDecoder;
#ifdef FOURSCORE_X86
extern const DecoderKernels kAvx2Decoder;
extern const DecoderKernels kAvx512Decoder;
extern const DecoderKernels kAvx512Bf16Decoder;
#endif

}  // namespace fourscore
