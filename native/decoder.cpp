#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "pool.h"

namespace fourscore {
namespace {

using i64 = std::int64_t;

constexpr i64 kRowsATask = 16;   // rows that a task normalises; as few are done by whoever ends the stage before
constexpr i64 kWidestTile = 256;  // outputs of a task when there are many rows: what it makes stays in L2
constexpr i64 kCoarse = 32;      // rows that a piece of a packed weight may have to be a multiple of
constexpr i64 kHeadTile = 1024;

i64 width(Float type) { return type == Float::f32 ? 4 : 2; }
i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
char* at(void* p, i64 i, Float type) { return static_cast<char*>(p) + i * width(type); }
const char* at(const void* p, i64 i, Float type) { return static_cast<const char*>(p) + i * width(type); }

// The least number of rows of `cols` values that is a multiple of `unit` values.
i64 rows_of(i64 unit, i64 cols) { return unit / std::gcd(unit, cols); }

// Rows n .. n + rows - 1 of a packed weight.
Weight piece(const Weight& w, i64 n, i64 rows) {
    Weight part = w;
    i64 block = n * w.cols / w.block;
    part.rows = rows;
    part.packed += n * w.cols / 2;
    if (w.scales) {
        part.scales += block;
    } else {
        part.codes += block;
        part.nested_absmax += block / w.nested_block;
    }
    return part;
}

}  // namespace

Linear::Linear(const Weight& w, const float* bias) : rows(w.rows), cols(w.cols), packed(true), weight(w), bias(bias) {
    if (!w.scales && rows_of(w.block * w.nested_block, w.cols) > kCoarse) {
        i64 blocks = ceil_div(w.rows * w.cols, w.block);
        scales_.resize(static_cast<std::size_t>(blocks));
        for (i64 b = 0; b < blocks; ++b)  // product and sum are rounded one by one, as in the kernels
            scales_[static_cast<std::size_t>(b)] = w.nested_code[w.codes[b]] * w.nested_absmax[b / w.nested_block] + w.nested_offset;
        weight.scales = scales_.data();
    }
    grain = rows_of(weight.scales ? w.block : w.block * w.nested_block, w.cols);
}

Linear::Linear(const void* dense, Float type, i64 rows, i64 cols, const float* bias)
    : rows(rows), cols(cols), packed(false), dense(dense), type(type), bias(bias) {}

Decoder::Decoder(const Backend& backend, const DecoderKernels& kernels, const Shape& shape, const void* embedding, float embedding_scale,
                 const Norm& last, std::shared_ptr<Linear> head, float logit_cap)
    : backend_(backend),
      kernels_(kernels),
      shape_(shape),
      embedding_(embedding),
      embedding_scale_(embedding_scale),
      last_(last),
      head_(std::move(head)),
      logit_cap_(logit_cap) {
    head_->index = linears_++;
}

void Decoder::add_layer(const Layer& layer) {
    layers_.push_back(layer);
    for (auto* group : {&layer.qkv, &layer.gate_up})
        for (const auto& linear : *group) linear->index = linears_++;
    layer.out->index = linears_++;
    layer.down->index = linears_++;
}

void Decoder::set_rope(i64 number, const Rope& rope) {
    std::lock_guard lock(one_caller_);
    ropes_.resize(std::max(ropes_.size(), static_cast<std::size_t>(number + 1)));
    ropes_[static_cast<std::size_t>(number)] = rope;
}

void Decoder::set_adapter(i64 number, std::vector<LowRank> parts) {
    std::lock_guard lock(one_caller_);
    adapters_.resize(std::max(adapters_.size(), static_cast<std::size_t>(number + 1)));
    adapters_[static_cast<std::size_t>(number)] = std::move(parts);
}

i64 Decoder::page_bytes() const {
    i64 each = kernels_.keys_bytes(shape_.width, shape_.type) + kernels_.values_bytes(shape_.width, shape_.type);
    return static_cast<i64>(layers_.size()) * shape_.groups * each;
}

// One call of `forward`: what its threads share, and the program that each of them goes through.
struct Pass {
    const Decoder& d;
    const Shape& s;
    const DecoderKernels& kernels;
    const i64* ids;
    const i64* keep;
    i64 rows, kept;
    float* logits;
    int threads;
    // Rows by adapter, before and after all but the kept rows are dropped; rows without one are in no segment.
    struct Segment {
        i64 first, count;
        const std::vector<LowRank>* parts;
    };
    std::vector<Segment> segments, kept_segments;
    struct Block {
        const Span* span;
        i64 group, first, rows;
        bool alone;  // the only block of its span: stores the span's keys and values itself
    };
    std::vector<Block> blocks;
    struct Piece {
        const Span* span;
        i64 first, count;  // rows of the span, all in one page
    };
    std::vector<Piece> pieces;
    char *h, *x, *t, *qkv, *mixed, *gated;  // residual stream, its norm, a branch's output, projections, attention, gate * up
    std::vector<Stage> stages;

    Pass(const Decoder& decoder, const i64* ids, i64 rows, const Span* spans, i64 span_count, const i64* keep, i64 kept, float* logits, int threads)
        : d(decoder),
          s(decoder.shape_),
          kernels(decoder.kernels_),
          ids(ids),
          keep(keep),
          rows(rows),
          kept(kept),
          logits(logits),
          threads(threads),
          stages(d.layers_.size() * 8 + 4) {
        i64 each = s.heads / s.groups;
        const i64* k = keep;
        for (const Span* span = spans; span < spans + span_count; ++span) {
            i64 total = span->count * each;
            bool alone = total <= kAttendRows;
            for (i64 first = (total - 1) / kAttendRows * kAttendRows; first >= 0; first -= kAttendRows)  // most keys first
                for (i64 g = 0; g < s.groups; ++g) blocks.push_back({span, g, first, std::min(kAttendRows, total - first), alone});
            for (i64 row = 0; !alone && row < span->count;) {
                i64 end = std::min(span->count, row + kPage - (span->start + row) % kPage);
                pieces.push_back({span, row, end - row});
                row = end;
            }
            const i64* k_end = k;
            while (k_end < keep + kept && *k_end < span->first + span->count) ++k_end;
            if (span->adapter >= 0) {
                const auto* parts = &d.adapters_[static_cast<std::size_t>(span->adapter)];
                append(segments, span->first, span->count, parts);
                append(kept_segments, k - keep, k_end - k, parts);
            }
            k = k_end;
        }
    }

    static void append(std::vector<Segment>& list, i64 first, i64 count, const std::vector<LowRank>* parts) {
        if (!count) return;
        if (!list.empty() && list.back().parts == parts && list.back().first + list.back().count == first)
            list.back().count += count;
        else
            list.push_back({first, count, parts});
    }

    i64 qkv_cols() const { return (s.heads + 2 * s.groups) * s.width; }
    i64 mixed_cols() const { return s.heads * s.width; }

    // Buffers, each row of which begins wherever; 64 bytes between them.
    std::size_t lay_out(char* base) {
        std::size_t used = 0;
        auto take = [&](i64 cols) {
            char* here = base + used;
            used += (static_cast<std::size_t>(rows * cols * width(s.type)) + 127) / 64 * 64;
            return here;
        };
        h = take(s.hidden), x = take(s.hidden), t = take(s.hidden);
        qkv = take(qkv_cols()), mixed = take(mixed_cols()), gated = take(s.inner);
        return used;
    }

    // y[m, count] = outputs n .. n + count - 1 for m rows of x [m, cols], adapters included.
    void apply(const Linear& linear, i64 n, i64 count, const char* in, i64 m, const std::vector<Segment>& adapted, char* y) const {
        const float* bias = linear.bias ? linear.bias + n : nullptr;
        if (linear.packed)
            d.backend_.forward(piece(linear.weight, n, count), in, m, linear.cols, s.type, bias, y, 1);
        else
            kernels.dense(at(linear.dense, n * linear.cols, s.type), count, linear.cols, in, m, linear.cols, s.type, bias, y, count, s.type);
        for (const Segment& segment : adapted) {
            const LowRank& part = (*segment.parts)[static_cast<std::size_t>(linear.index)];
            if (!part.rank) continue;
            float* inner = static_cast<float*>(scratch(0, static_cast<std::size_t>(segment.count * part.rank) * sizeof(float)));
            kernels.dense(part.a, part.rank, linear.cols, at(in, segment.first * linear.cols, s.type), segment.count, linear.cols, s.type, nullptr,
                          inner, part.rank, Float::f32);
            kernels.add_low_rank(inner, at(part.b, n, s.type), part.rank, linear.rows, part.scale, segment.count, count, s.type,
                                 at(y, segment.first * count, s.type));
        }
    }

    // Outputs that a task takes: some tasks for each thread, whole register tiles, pieces that can be cut out.
    i64 tile(const Linear& linear, i64 outputs, i64 m) const {
        i64 wanted = threads == 1 ? outputs : ceil_div(outputs, 4 * threads);
        if (m > kRowsATask) wanted = std::min(wanted, kWidestTile);
        i64 step = std::lcm(linear.grain, i64{16});
        return std::min(outputs, ceil_div(wanted, step) * step);
    }

    // f(linear, its first column in the common output, first row, rows) for task `task` of the stage of `linears`.
    template <class F>
    void part_of(const std::vector<std::shared_ptr<Linear>>& linears, i64 m, i64 task, const F& f) const {
        i64 column = 0;
        for (const auto& linear : linears) {
            i64 each = tile(*linear, linear->rows, m), tasks = ceil_div(linear->rows, each);
            if (task < tasks) return f(*linear, column, task * each, std::min(each, linear->rows - task * each));
            task -= tasks;
            column += linear->rows;
        }
    }
    i64 parts(const std::vector<std::shared_ptr<Linear>>& linears, i64 m) const {
        i64 tasks = 0;
        for (const auto& linear : linears) tasks += ceil_div(linear->rows, tile(*linear, linear->rows, m));
        return tasks;
    }

    char* outputs(i64 m, i64 count) const { return static_cast<char*>(scratch(3, static_cast<std::size_t>(m * count * width(s.type)))); }

    void copy_columns(const char* from, i64 m, i64 count, char* to, i64 to_stride) const {
        for (i64 r = 0; r < m; ++r)
            std::memcpy(at(to, r * to_stride, s.type), at(from, r * count, s.type), static_cast<std::size_t>(count * width(s.type)));
    }

    // Queries and keys of some rows and groups normalised and turned, keys and values into their pages.
    void store(const Layer& layer, i64 number, const Span& span, i64 first, i64 count, i64 group, i64 groups) const {
        i64 each = s.heads / s.groups;
        const Rope* rope = layer.rope < 0 ? nullptr : &d.ropes_[static_cast<std::size_t>(layer.rope)];
        for (i64 r = first; r < first + count; ++r) {
            char* row = at(qkv, (span.first + r) * qkv_cols(), s.type);
            i64 place = span.start + r;
            auto turn = [&](i64 head, const Norm& norm) {
                char* p = at(row, head * s.width, s.type);
                if (norm.weight) kernels.norm(p, norm, s.width, s.type, p);
                if (rope) kernels.rope(p, rope->cos + place * rope->rotary / 2, rope->sin + place * rope->rotary / 2, rope->rotary, s.type);
            };
            for (i64 head = group * each; head < (group + groups) * each; ++head) turn(head, layer.query);
            for (i64 g = group; g < group + groups; ++g) {
                turn(s.heads + g, layer.key);
                kernels.store(at(row, (s.heads + g) * s.width, s.type), at(row, (s.heads + s.groups + g) * s.width, s.type), s.width, s.type,
                              pages(number, g, span), place);
            }
        }
    }
    Pages pages(i64 number, i64 group, const Span& span) const {
        i64 keys = kernels.keys_bytes(s.width, s.type), values = kernels.values_bytes(s.width, s.type);
        i64 offset = (number * s.groups + group) * (keys + values);
        return {span.pages, offset, offset + keys};
    }

    void attend(const Layer& layer, i64 number, const Block& b) const {
        const Span& span = *b.span;
        i64 each = s.heads / s.groups;
        if (b.alone) store(layer, number, span, 0, span.count, b.group, 1);
        Group g{each, s.width, layer.window, s.scale, s.attention_cap, s.type};
        kernels.attend(g, pages(number, b.group, span), at(qkv, span.first * qkv_cols() + b.group * each * s.width, s.type), qkv_cols(), span.start,
                       b.first, b.rows, at(mixed, span.first * mixed_cols() + b.group * each * s.width, s.type), mixed_cols());
    }

    // A branch's outputs: onto the residual stream, or, where a norm comes first, aside.
    void branch(const Linear& linear, i64 n, i64 count, const char* in, i64 m, const std::vector<Segment>& adapted, bool aside) const {
        char* y = outputs(m, count);
        apply(linear, n, count, in, m, adapted, y);
        if (aside) return copy_columns(y, m, count, at(t, n, s.type), s.hidden);
        for (i64 r = 0; r < m; ++r) kernels.add(at(y, r * count, s.type), count, s.type, at(h, r * s.hidden + n, s.type));
    }

    void gate(const Layer& layer, i64 n, i64 count, i64 m, const std::vector<Segment>& adapted) const {
        char* y = outputs(2 * m, count);
        char* up = at(y, m * count, s.type);
        i64 stride = count;
        const Linear& first = *layer.gate_up.front();
        if (layer.gate_up.size() == 2) {
            apply(first, n, count, x, m, adapted, y);
            apply(*layer.gate_up[1], n, count, x, m, adapted, up);
        } else if (count == s.inner) {
            apply(first, 0, 2 * count, x, m, adapted, y);
            up = at(y, count, s.type), stride = 2 * count;
        } else {
            apply(first, n, count, x, m, adapted, y);
            apply(first, s.inner + n, count, x, m, adapted, up);
        }
        for (i64 r = 0; r < m; ++r)
            kernels.gate(at(y, r * stride, s.type), at(up, r * stride, s.type), s.activation, count, s.type, at(gated, r * s.inner + n, s.type));
    }
    i64 gate_tile(const Layer& layer, i64 m) const {
        i64 each = tile(*layer.gate_up.front(), s.inner, m);
        if (layer.gate_up.size() == 2) each = std::max(each, tile(*layer.gate_up[1], s.inner, m));
        return layer.gate_up.size() == 1 && s.inner % layer.gate_up.front()->grain ? s.inner : each;
    }

    // What comes between two branches, for one row.
    void between(i64 r, const Norm& after, const Norm& before) const {
        char *stream = at(h, r * s.hidden, s.type), *branched = at(t, r * s.hidden, s.type);
        if (after.weight) {
            kernels.norm(branched, after, s.hidden, s.type, branched);
            kernels.add(branched, s.hidden, s.type, stream);
        }
        kernels.norm(stream, before, s.hidden, s.type, at(x, r * s.hidden, s.type));
    }

    // A stage of m rows' linear layers, and `between` after it.
    template <class Task>
    void linear_stage(Stage*& stage, i64 count, i64 m, const Task& task, const Norm& after, const Norm& before) const {
        if (m <= kRowsATask) {
            (stage++)->go(count, task, [&] {
                for (i64 r = 0; r < m; ++r) between(r, after, before);
            });
        } else {
            (stage++)->go(count, task, [] {});
            (stage++)->go(
                ceil_div(m, kRowsATask),
                [&](i64 i) {
                    for (i64 r = i * kRowsATask; r < std::min(m, (i + 1) * kRowsATask); ++r) between(r, after, before);
                },
                [] {});
        }
    }

    void program() {
        Stage* stage = stages.data();
        auto nothing = [] {};
        (stage++)->go(
            ceil_div(rows, kRowsATask),
            [&](i64 i) {
                for (i64 r = i * kRowsATask; r < std::min(rows, (i + 1) * kRowsATask); ++r) {
                    kernels.scale(at(d.embedding_, ids[r] * s.hidden, s.type), d.embedding_scale_, s.hidden, s.type, at(h, r * s.hidden, s.type));
                    between(r, Norm{}, d.layers_.front().before_attention);
                }
            },
            nothing);
        i64 m = rows;
        const std::vector<Segment>* adapted = &segments;
        for (std::size_t l = 0; l < d.layers_.size(); ++l) {
            const Layer& layer = d.layers_[l];
            i64 number = static_cast<i64>(l);
            bool last = l + 1 == d.layers_.size();
            (stage++)->go(
                parts(layer.qkv, m),
                [&](i64 task) {
                    part_of(layer.qkv, m, task, [&](const Linear& linear, i64 column, i64 n, i64 count) {
                        char* to = at(qkv, column + n, s.type);
                        if (m == 1) return apply(linear, n, count, x, m, *adapted, to);
                        char* y = outputs(m, count);
                        apply(linear, n, count, x, m, *adapted, y);
                        copy_columns(y, m, count, to, qkv_cols());
                    });
                },
                nothing);
            if (!pieces.empty())
                (stage++)->go(
                    static_cast<i64>(pieces.size()),
                    [&](i64 i) {
                        const Piece& p = pieces[static_cast<std::size_t>(i)];
                        store(layer, number, *p.span, p.first, p.count, 0, s.groups);
                    },
                    nothing);
            (stage++)->go(
                static_cast<i64>(blocks.size()), [&](i64 i) { attend(layer, number, blocks[static_cast<std::size_t>(i)]); },
                [&] {
                    if (last) drop_rows();
                });
            if (last) m = kept, adapted = &kept_segments;
            if (!m) return;
            i64 each = tile(*layer.out, s.hidden, m);
            linear_stage(
                stage, ceil_div(s.hidden, each), m,
                [&](i64 i) {
                    branch(*layer.out, i * each, std::min(each, s.hidden - i * each), mixed, m, *adapted, layer.after_attention.weight);
                },
                layer.after_attention, layer.before_mlp);
            i64 gate_each = gate_tile(layer, m);
            (stage++)->go(
                ceil_div(s.inner, gate_each), [&](i64 i) { gate(layer, i * gate_each, std::min(gate_each, s.inner - i * gate_each), m, *adapted); },
                nothing);
            i64 down_each = tile(*layer.down, s.hidden, m);
            linear_stage(
                stage, ceil_div(s.hidden, down_each), m,
                [&](i64 i) {
                    branch(*layer.down, i * down_each, std::min(down_each, s.hidden - i * down_each), gated, m, *adapted, layer.after_mlp.weight);
                },
                layer.after_mlp, last ? d.last_ : d.layers_[l + 1].before_attention);
        }
        (stage++)->go(ceil_div(d.head_->rows, head_tile()), [&](i64 i) { head(i * head_tile()); }, nothing);
    }

    // The kept rows, and what attention made of them, to the front: nothing else is needed after the last attention.
    void drop_rows() {
        for (i64 i = 0; i < kept; ++i) {
            std::memmove(at(h, i * s.hidden, s.type), at(h, keep[i] * s.hidden, s.type), static_cast<std::size_t>(s.hidden * width(s.type)));
            std::memmove(at(mixed, i * mixed_cols(), s.type), at(mixed, keep[i] * mixed_cols(), s.type),
                         static_cast<std::size_t>(mixed_cols() * width(s.type)));
        }
    }

    i64 head_tile() const { return d.head_->packed ? tile(*d.head_, d.head_->rows, kept) : kHeadTile; }

    void head(i64 n) const {
        const Linear& linear = *d.head_;
        i64 vocabulary = linear.rows, count = std::min(head_tile(), vocabulary - n);
        if (linear.packed) {
            char* y = outputs(kept, count);
            apply(linear, n, count, x, kept, {}, y);
            for (i64 r = 0; r < kept; ++r)
                for (i64 i = 0; i < count; ++i) {
                    std::uint32_t bits = 0;
                    if (s.type == Float::f32)
                        std::memcpy(&bits, at(y, r * count + i, s.type), 4);
                    else
                        std::memcpy(reinterpret_cast<char*>(&bits) + 2, at(y, r * count + i, s.type), 2);
                    std::memcpy(logits + r * vocabulary + n + i, &bits, 4);
                }
        } else {
            kernels.dense(at(linear.dense, n * linear.cols, s.type), count, linear.cols, x, kept, linear.cols, s.type,
                          linear.bias ? linear.bias + n : nullptr, logits + n, vocabulary, Float::f32);
        }
        if (d.logit_cap_ != 0)
            for (i64 r = 0; r < kept; ++r) kernels.cap(logits + r * vocabulary + n, count, d.logit_cap_);
    }
};

void Decoder::forward(const i64* ids, i64 rows, const Span* spans, i64 span_count, const i64* keep, i64 kept, float* logits, int threads) {
    std::lock_guard lock(one_caller_);
    Pass pass(*this, ids, rows, spans, span_count, keep, kept, logits, threads);
    std::size_t bytes = pass.lay_out(nullptr) + 64;
    if (memory_.size() < bytes) memory_ = std::vector<char>(bytes);
    char* base = memory_.data();
    pass.lay_out(base + (64 - reinterpret_cast<std::uintptr_t>(base) % 64) % 64);
    run(threads, threads, [](void* p, i64) { static_cast<Pass*>(p)->program(); }, &pass);
}

}  // namespace fourscore
