// Causal attention with grouped heads, forward and backward, without ever holding a row of scores: keys go by in tiles of 64
// that are scored, exponentiated and multiplied with their values while they are in the nearest cache. Query i of n stands at
// place keys - queries + i, so a chunk of queries after a cache is the same call. A query's result depends on its own row, and
// on keys and values up to its place: tiles begin at multiples of 64 and are summed in order, whatever else is in the call.
//
// Products are made by one small kernel, C[row][lanes] += sum over steps of A[row, step] * B[step][lanes]. With bf16 dot
// products a step is two values of the dimension that is summed over; B then holds them side by side, and so must A.
#pragma once

#include <cmath>

#include "ops.h"
#include "products.h"

namespace fourscore::FOURSCORE_ISA {
namespace {

constexpr i64 kTile = 64;  // keys, and queries, worked on at a time

template <class P, int R, int J>
static inline void product(const typename P::E* a, i64 a_row, i64 a_step, const typename P::E* b, i64 b_step, i64 steps, float* c,
                           i64 c_row, const float* keep) {
    Vec acc[R][J];
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < J; ++j) acc[i][j] = keep ? load<Float::f32>(c, i * c_row + j * kLanes) * keep[i] : Vec{};
    for (i64 s = 0; s < steps; ++s) {
        typename P::Operand w[J];
        for (int j = 0; j < J; ++j) w[j] = P::operand(b + s * b_step + j * kLanes * P::kPer);
        for (int i = 0; i < R; ++i) {
            typename P::Operand x = P::spread(a + i * a_row + s * a_step);
            for (int j = 0; j < J; ++j) acc[i][j] = P::multiply_add(acc[i][j], x, w[j]);
        }
    }
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < J; ++j) store<Float::f32>(c, i * c_row + j * kLanes, acc[i][j]);
}

// C[rows][vectors] = A B, after keep[row] * C where `keep` is given. rows: at most kTileRows.
template <class P>
static inline void multiply(i64 rows, i64 vectors, const typename P::E* a, i64 a_row, i64 a_step, const typename P::E* b, i64 b_step,
                            i64 steps, float* c, i64 c_row, const float* keep) {
    with_number<kTileRows>(rows, [&]<int R>() {
        i64 v = 0;
        for (; v + kTileVectors <= vectors; v += kTileVectors)
            product<P, R, kTileVectors>(a, a_row, a_step, b + v * kLanes * P::kPer, b_step, steps, c + v * kLanes, c_row, keep);
        if (v < vectors)
            with_number<kTileVectors>(vectors - v, [&]<int J>() {
                product<P, R, J>(a, a_row, a_step, b + v * kLanes * P::kPer, b_step, steps, c + v * kLanes, c_row, keep);
            });
    });
}

// Rows [first, first + count) of one head, to the places where products want them; zeros up to kTile rows and to full vectors.
template <class P>
struct Layout {
    using E = typename P::E;
    i64 d, deep, wide;  // values of a head; as summed over, in whole steps; as lanes, in whole vectors
    explicit Layout(i64 width) : d(width), deep(ceil_div(width, 2) * 2), wide(ceil_div(width, 16) * 16) {}

    i64 rows_size() const { return kTile * deep; }
    i64 down_size() const { return kTile * wide; }

    // [row][deep]
    void rows(const char* p, i64 stride, i64 count, Float type, E* out) const {
        for (i64 i = 0; i < kTile; ++i) {
            if (i < count) P::copy(p + i * stride, d, type, out + i * deep);
            for (i64 k = i < count ? d : 0; k < deep; ++k) out[i * deep + k] = 0;
        }
    }
    // [step over d][row][per]: a row a lane.
    void across(const E* by_row, E* out) const {
        for (i64 s = 0; s < deep / P::kPer; ++s)
            for (i64 i = 0; i < kTile; ++i) std::memcpy(out + (s * kTile + i) * P::kPer, by_row + i * deep + s * P::kPer, sizeof(E) * P::kPer);
    }
    // [step over rows][wide][per]: a value of the head a lane.
    void down(const E* by_row, E* out) const {
        for (i64 s = 0; s < kTile / P::kPer; ++s) {
            E* o = out + s * wide * P::kPer;
            for (i64 k = 0; k < d; ++k)
                for (i64 r = 0; r < P::kPer; ++r) o[k * P::kPer + r] = by_row[(s * P::kPer + r) * deep + k];
            for (i64 k = d * P::kPer; k < wide * P::kPer; ++k) o[k] = 0;
        }
    }
};

static inline Ints lane_numbers() {
    Ints n;
    for (int i = 0; i < kLanes; ++i) n[i] = i;
    return n;
}
static inline char* head_of(const Heads& x, i64 b, i64 h, i64 t, Float type) {
    return static_cast<char*>(x.data) + (b * x.batch + h * x.head + t * x.place) * width(type);
}
static inline void store_any(void* p, const float* values, i64 n, float times, Float type) {
    with_type(type, [&]<Float T>() {
        i64 k = 0;
        for (; k + kLanes <= n; k += kLanes) store<T>(p, k, load<Float::f32>(values, k) * times);
        if (k < n) store_some<T>(p, k, n - k, load<Float::f32>(values, k) * times);
    });
}

template <class P>
struct Forward {
    using E = typename P::E;
    const Attention& a;
    const Heads &q, &k, &v, &out;
    float* normaliser;
    Layout<P> layout;
    i64 tiles;  // of keys
    E *keys, *values;

    // Keys across and values down, tile by tile.
    static void lay_out(void* p, i64 task) {
        Forward& f = *static_cast<Forward*>(p);
        i64 tile = task % f.tiles, g = task / f.tiles % f.a.groups, b = task / f.tiles / f.a.groups;
        i64 count = least(kTile, f.a.keys - tile * kTile), bytes = width(f.a.type);
        E* row = static_cast<E*>(scratch(1, static_cast<std::size_t>(f.layout.rows_size()) * sizeof(E)));
        f.layout.rows(head_of(f.k, b, g, tile * kTile, f.a.type), f.k.place * bytes, count, f.a.type, row);
        f.layout.across(row, f.keys + task * f.layout.rows_size());
        f.layout.rows(head_of(f.v, b, g, tile * kTile, f.a.type), f.v.place * bytes, count, f.a.type, row);
        f.layout.down(row, f.values + task * f.layout.down_size());
    }

    // One block of queries of one head; the blocks with most keys first.
    static void attend(void* p, i64 task) {
        Forward& f = *static_cast<Forward*>(p);
        const Attention& a = f.a;
        i64 blocks = ceil_div(a.queries, kTile), pairs = a.batch * a.heads;
        i64 first = (blocks - 1 - task / pairs) * kTile, h = task % pairs % a.heads, b = task % pairs / a.heads;
        i64 count = least(kTile, a.queries - first), wide = f.layout.wide, deep = f.layout.deep, before = a.keys - a.queries + first;
        i64 head = (b * a.groups + h / (a.heads / a.groups)) * f.tiles;
        struct State {
            float score[kTileRows * kTile];
            float most[kTile], sum[kTile], keep[kTile + kLanes];
            E share[kTileRows * kTile];
        };
        State& s = *static_cast<State*>(scratch(1, sizeof(State)));
        E* query = static_cast<E*>(scratch(2, static_cast<std::size_t>(f.layout.rows_size()) * sizeof(E)));
        float* o = static_cast<float*>(scratch(3, static_cast<std::size_t>(kTile * wide) * sizeof(float)));
        f.layout.rows(head_of(f.q, b, h, first, a.type), f.q.place * width(a.type), count, a.type, query);
        std::memset(o, 0, static_cast<std::size_t>(kTile * wide) * sizeof(float));
        for (i64 i = 0; i < kTile; ++i) s.most[i] = -__builtin_inff(), s.sum[i] = 0;
        const Ints lanes = lane_numbers();
        const Vec scale = all(a.scale), never = all(-__builtin_inff());
        for (i64 tile = 0; tile * kTile < before + count; ++tile) {
            const E *keys = f.keys + (head + tile) * f.layout.rows_size(), *values = f.values + (head + tile) * f.layout.down_size();
            for (i64 i = 0; i < count; i += kTileRows) {
                i64 rows = least(kTileRows, count - i), seen = least(kTile, before + i + rows - tile * kTile);
                if (seen <= 0) continue;
                i64 vectors = ceil_div(seen, kLanes);
                multiply<P>(rows, vectors, query + i * deep, deep, P::kPer, keys, kTile * P::kPer, deep / P::kPer, s.score, kTile, nullptr);
                Vec now[kTileRows];
                float change[kLanes] = {};
                for (i64 r = 0; r < rows; ++r) {
                    float* score = s.score + r * kTile;
                    i64 own = before + i + r + 1 - tile * kTile;  // keys of this tile that this query sees
                    Vec top = never;
                    for (i64 v = 0; v < vectors; ++v) {
                        Vec x = load<Float::f32>(score, v * kLanes) * scale;
                        if (own < (v + 1) * kLanes) x = lanes < static_cast<std::int32_t>(most(own - v * kLanes, 0)) ? x : never;
                        store<Float::f32>(score, v * kLanes, x);
                        top = larger(x, top);
                    }
                    float before_ = s.most[i + r], most_ = largest(top);
                    most_ = most_ > before_ ? most_ : before_;
                    s.most[i + r] = most_;
                    change[r] = before_ - most_;
                    now[r] = all(most_);
                }
                Vec keep = exponential(load<Float::f32>(change, 0));
                store<Float::f32>(s.keep, 0, keep);
                for (i64 r = 0; r < rows; ++r) {
                    Vec sum{};
                    for (i64 v = 0; v < vectors; ++v) {
                        Vec x = exponential(load<Float::f32>(s.score, r * kTile + v * kLanes) - now[r]);
                        P::put(s.share + r * kTile + v * kLanes, x);
                        sum += x;
                    }
                    s.sum[i + r] = s.sum[i + r] * s.keep[r] + add_up(sum);
                }
                multiply<P>(rows, wide / kLanes, s.share, kTile, P::kPer, values, wide * P::kPer, ceil_div(least(vectors * kLanes, kTile), P::kPer),
                            o + i * wide, wide, s.keep);
            }
        }
        for (i64 i = 0; i < count; ++i) {
            store_any(head_of(f.out, b, h, first + i, a.type), o + i * wide, a.width, 1.0f / s.sum[i], a.type);
            f.normaliser[(b * a.heads + h) * a.queries + first + i] = s.most[i] + std::log(s.sum[i]);
        }
    }
};

template <class P>
void attend_forward(const Attention& a, const Heads& q, const Heads& k, const Heads& v, const Heads& out, float* normaliser, int threads) {
    using E = typename P::E;
    Layout<P> layout(a.width);
    i64 tiles = ceil_div(a.keys, kTile), packed = a.batch * a.groups * tiles;
    E* keys = static_cast<E*>(scratch(0, static_cast<std::size_t>(packed * (layout.rows_size() + layout.down_size())) * sizeof(E)));
    Forward<P> f{a, q, k, v, out, normaliser, layout, tiles, keys, keys + packed * layout.rows_size()};
    if (a.batch * a.heads * a.queries * a.keys * a.width < 1 << 18) threads = 1;
    run(threads, packed, Forward<P>::lay_out, &f);
    run(threads, ceil_div(a.queries, kTile) * a.batch * a.heads, Forward<P>::attend, &f);
}

// All heads that share a key head, one after the other: keys and values are laid out once, their gradients summed in f32.
template <class P>
struct Backward {
    using E = typename P::E;
    const Attention& a;
    const Heads &q, &k, &v, &out, &dout, &dq, &dk, &dv;
    const float* normaliser;
    Layout<P> layout;
    i64 tiles;

    struct Block {  // of queries
        E share[kTile * kTile], slope[kTile * kTile];  // [step over queries][key][per]
        E slope_rows[kTileRows * kTile];
        float score[kTileRows * kTile], grown[kTileRows * kTile];
        float along[kTile], normaliser[kTile], ones[kTileRows];
    };

    static void group(void* p, i64 task) {
        Backward& f = *static_cast<Backward*>(p);
        const Attention& a = f.a;
        const Layout<P>& l = f.layout;
        i64 g = task % a.groups, b = task / a.groups, each = a.heads / a.groups, bytes = width(a.type);
        i64 rows_size = l.rows_size(), down_size = l.down_size();
        // Keys across, keys down, values across, tile by tile; then one block of queries: q and dout by row and down.
        E* keys = static_cast<E*>(scratch(1, static_cast<std::size_t>(f.tiles * (2 * rows_size + down_size) + 2 * (rows_size + down_size)) * sizeof(E)));
        E *keys_down = keys + f.tiles * rows_size, *values = keys_down + f.tiles * down_size, *query = values + f.tiles * rows_size;
        E *grown = query + rows_size, *query_down = grown + rows_size, *grown_down = query_down + down_size;
        // Gradients of keys, of values, of one block of queries.
        std::size_t sums = static_cast<std::size_t>((2 * f.tiles + 1) * kTile * l.wide) * sizeof(float);
        float* dk = static_cast<float*>(scratch(2, sums));
        float *dv = dk + f.tiles * kTile * l.wide, *dq = dv + f.tiles * kTile * l.wide;
        Block& block = *static_cast<Block*>(scratch(3, sizeof(Block)));
        for (float& one : block.ones) one = 1;
        std::memset(dk, 0, sums);
        for (i64 tile = 0; tile < f.tiles; ++tile) {
            i64 count = least(kTile, a.keys - tile * kTile);
            l.rows(head_of(f.k, b, g, tile * kTile, a.type), f.k.place * bytes, count, a.type, query);
            l.across(query, keys + tile * rows_size);
            l.down(query, keys_down + tile * down_size);
            l.rows(head_of(f.v, b, g, tile * kTile, a.type), f.v.place * bytes, count, a.type, query);
            l.across(query, values + tile * rows_size);
        }
        for (i64 h = g * each; h < (g + 1) * each; ++h)
            for (i64 first = 0; first < a.queries; first += kTile) {
                i64 count = least(kTile, a.queries - first), before = a.keys - a.queries + first;
                l.rows(head_of(f.q, b, h, first, a.type), f.q.place * bytes, count, a.type, query);
                l.down(query, query_down);
                l.rows(head_of(f.dout, b, h, first, a.type), f.dout.place * bytes, count, a.type, grown);
                l.down(grown, grown_down);
                std::memset(dq, 0, static_cast<std::size_t>(kTile * l.wide) * sizeof(float));
                for (i64 i = 0; i < count; ++i) {
                    block.normaliser[i] = f.normaliser[(b * a.heads + h) * a.queries + first + i];
                    block.along[i] = f.dot(head_of(f.out, b, h, first + i, a.type), head_of(f.dout, b, h, first + i, a.type));
                }
                for (i64 tile = 0; tile * kTile < before + count; ++tile)
                    f.pair(block, count, before - tile * kTile, query, grown, query_down, grown_down, keys + tile * rows_size,
                           keys_down + tile * down_size, values + tile * rows_size, dq, dk + tile * kTile * l.wide, dv + tile * kTile * l.wide);
                for (i64 i = 0; i < count; ++i) store_any(head_of(f.dq, b, h, first + i, a.type), dq + i * l.wide, a.width, 1, a.type);
            }
        for (i64 i = 0; i < a.keys; ++i) {
            store_any(head_of(f.dk, b, g, i, a.type), dk + i * l.wide, a.width, 1, a.type);
            store_any(head_of(f.dv, b, g, i, a.type), dv + i * l.wide, a.width, 1, a.type);
        }
    }

    float dot(const void* x, const void* y) const {
        Vec sum{};
        with_type(a.type, [&]<Float T>() {
            i64 k = 0;
            for (; k + kLanes <= a.width; k += kLanes) sum = fma(load<T>(x, k), load<T>(y, k), sum);
            if (k < a.width) sum = fma(load_some<T>(x, k, a.width - k), load_some<T>(y, k, a.width - k), sum);
        });
        return add_up(sum);
    }

    // One block of queries with one tile of keys; the first query sees key `before` of the tile and those in front of it.
    void pair(Block& t, i64 count, i64 before, const E* query, const E* grown, const E* query_down, const E* grown_down, const E* keys,
              const E* keys_down, const E* values, float* dq, float* dk, float* dv) const {
        constexpr i64 per = P::kPer;
        static_assert(kTileRows % per == 0);
        i64 deep = layout.deep, wide = layout.wide, steps = ceil_div(count, per);
        const Ints lanes = lane_numbers();
        const Vec scale = all(a.scale);
        for (i64 i = 0; i < count; i += kTileRows) {
            i64 rows = least(kTileRows, count - i), seen = least(kTile, before + i + rows), vectors = ceil_div(most(seen, 0), kLanes);
            if (vectors) {
                multiply<P>(rows, vectors, query + i * deep, deep, per, keys, kTile * per, deep / per, t.score, kTile, nullptr);
                multiply<P>(rows, vectors, grown + i * deep, deep, per, values, kTile * per, deep / per, t.grown, kTile, nullptr);
            }
            for (i64 r = 0; r < rows; r += per)
                for (i64 v = 0; v < kTile / kLanes; ++v) {
                    Vec share[per] = {}, slope[per] = {};
                    for (i64 e = 0; e < per && v < vectors; ++e) {
                        if (r + e >= rows) continue;
                        i64 at = (r + e) * kTile + v * kLanes, row = i + r + e, own = before + row + 1;
                        Vec x = exponential(fma(load<Float::f32>(t.score, at), scale, all(-t.normaliser[row])));
                        if (own < (v + 1) * kLanes) x = lanes < static_cast<std::int32_t>(most(own - v * kLanes, 0)) ? x : Vec{};
                        share[e] = x;
                        slope[e] = x * (load<Float::f32>(t.grown, at) - t.along[row]) * scale;
                        P::put(t.slope_rows + at, slope[e]);
                    }
                    i64 at = ((i + r) / per * kTile + v * kLanes) * per;
                    P::put_beside(t.share + at, share);
                    P::put_beside(t.slope + at, slope);
                }
            if (vectors)
                multiply<P>(rows, wide / kLanes, t.slope_rows, kTile, per, keys_down, wide * per, least(vectors * kLanes, kTile) / per,
                            dq + i * wide, wide, t.ones);
        }
        for (i64 j = 0; j < least(kTile, before + count); j += kTileRows) {
            i64 rows = least(kTileRows, kTile - j), from = most(j - before, 0) / per;  // the first step with a query that sees key j
            i64 a_at = from * kTile * per + j * per, b_at = from * wide * per;
            multiply<P>(rows, wide / kLanes, t.share + a_at, per, kTile * per, grown_down + b_at, wide * per, steps - from, dv + j * wide, wide, t.ones);
            multiply<P>(rows, wide / kLanes, t.slope + a_at, per, kTile * per, query_down + b_at, wide * per, steps - from, dk + j * wide, wide, t.ones);
        }
    }
};

template <class P>
void attend_backward(const Attention& a, const Heads& q, const Heads& k, const Heads& v, const Heads& out, const float* normaliser,
                     const Heads& dout, const Heads& dq, const Heads& dk, const Heads& dv, int threads) {
    Backward<P> f{a, q, k, v, out, dout, dq, dk, dv, normaliser, Layout<P>(a.width), ceil_div(a.keys, kTile)};
    if (a.batch * a.heads * a.queries * a.keys * a.width < 1 << 18) threads = 1;
    run(threads, a.batch * a.groups, Backward<P>::group, &f);
}

void attention_forward(const Attention& a, const Heads& q, const Heads& k, const Heads& v, const Heads& out, float* normaliser, int threads) {
#if defined(__AVX512BF16__)
    if (a.type == Float::bf16) return attend_forward<Pairs>(a, q, k, v, out, normaliser, threads);
#endif
    attend_forward<Singles>(a, q, k, v, out, normaliser, threads);
}

void attention_backward(const Attention& a, const Heads& q, const Heads& k, const Heads& v, const Heads& out, const float* normaliser,
                        const Heads& dout, const Heads& dq, const Heads& dk, const Heads& dv, int threads) {
#if defined(__AVX512BF16__)
    if (a.type == Float::bf16) return attend_backward<Pairs>(a, q, k, v, out, normaliser, dout, dq, dk, dv, threads);
#endif
    attend_backward<Singles>(a, q, k, v, out, normaliser, dout, dq, dk, dv, threads);
}

}  // namespace
}  // namespace fourscore::FOURSCORE_ISA
