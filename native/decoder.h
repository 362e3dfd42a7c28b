// A whole forward pass of a Llama-like decoder: one ragged batch of any mix of prompt pieces and single tokens through all layers
// in one parallel region. What varies between the families is data (Layer); every weight stays where it is and belongs to the caller.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "crew.h"
#include "decoder_kernels.h"

namespace fourscore {

// A linear layer: packed NF4, or dense in the decoder's type. Tasks take rows of it in multiples of `grain`, so that a piece of
// a packed weight is a weight again. Where double quantisation would make that coarse, the scales are expanded to f32 (same values).
class Linear {
 public:
    Linear(const Weight& weight, const float* bias);
    Linear(const void* dense, Float type, std::int64_t rows, std::int64_t cols, const float* bias);

    std::int64_t rows, cols, grain = 1;
    std::int64_t index = -1;  // in the decoder's list
    bool packed;
    Weight weight{};
    const void* dense = nullptr;
    Float type = Float::f32;
    const float* bias;

 private:
    std::vector<float> scales_;
};

// norms after_*: of what is added to the residual stream. qkv and gate_up: one layer with stacked outputs, or each its own.
struct Layer {
    Norm before_attention, after_attention, before_mlp, after_mlp, query, key;
    std::vector<std::shared_ptr<Linear>> qkv, gate_up;
    std::shared_ptr<Linear> out, down;
    std::int64_t rope = -1, window = 0;
};

struct Shape {
    std::int64_t hidden, heads, groups, width, inner;
    float scale, attention_cap;
    Activation activation;
    Float type;
};

// cos and sin [places, rotary / 2], rounded to the decoder's type.
struct Rope {
    const float *cos, *sin;
    std::int64_t rotary;
};

// y += scale * (x a^T) b: a [rank, cols], b [rank, rows], in the decoder's type; rank 0: nothing.
struct LowRank {
    const void *a = nullptr, *b = nullptr;
    std::int64_t rank = 0;
    float scale = 0;
};

// `count` rows of the batch from `first` on are the places from `start` on of a sequence whose pages the table names.
struct Span {
    std::int64_t first, count, start;
    const std::int64_t* pages;
    std::int64_t adapter;  // -1: none
};

class Decoder {
 public:
    Decoder(const Backend&, const DecoderKernels&, const Shape&, const void* embedding, float embedding_scale, const Norm& last,
            std::shared_ptr<Linear> head, float logit_cap);

    void add_layer(const Layer&);
    // Tables may move as they grow; not during a forward pass.
    void set_rope(std::int64_t number, const Rope&);
    // parts: one for each linear layer, in the order of Linear::index.
    void set_adapter(std::int64_t number, std::vector<LowRank> parts);
    std::int64_t page_bytes() const;
    // Logits, f32 [kept, vocabulary], of the rows `keep` (ascending). Each span's pages must reach to its last place.
    void forward(const std::int64_t* ids, std::int64_t rows, const Span* spans, std::int64_t span_count, const std::int64_t* keep,
                 std::int64_t kept, float* logits, int threads);

 private:
    friend struct Pass;
    const Backend& backend_;
    const DecoderKernels& kernels_;
    Shape shape_;
    const void* embedding_;
    float embedding_scale_;
    Norm last_;
    std::shared_ptr<Linear> head_;
    float logit_cap_;
    std::vector<Layer> layers_;
    std::vector<Rope> ropes_;
    std::vector<std::vector<LowRank>> adapters_;
    std::int64_t linears_ = 0;
    std::vector<char> memory_;
    std::mutex one_caller_;
};

}  // namespace fourscore
