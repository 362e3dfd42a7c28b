// Attention over pages. A page keeps the keys and values of 16 tokens as the products want them, so nothing is laid out anew:
// keys as [step over the head][token][per], a token a lane; values as [step over tokens][value][per], a value a lane. A step is
// two neighbours where the machine has bf16 dot products, else one (then bf16 is widened as it is loaded).
//
// Keys go by in tiles of 64 that begin at multiples of 64 and are summed in order. What a query does not see counts for nothing
// exactly (a share of 0), so its bits depend on its own keys alone: not on the rows that share a call, nor on how the sequence
// was cut into calls.
#pragma once

#include "decoder_rows.h"

namespace fourscore::FOURSCORE_ISA {
namespace {

constexpr i64 kKeys = 64;  // keys worked on at a time
#if defined(__AVX512F__)
constexpr int kTogether = 6, kAbreast = 4;  // rows and vectors of a register tile
#elif defined(__AVX2__)
constexpr int kTogether = 6, kAbreast = 2;
#else
constexpr int kTogether = 4, kAbreast = 2;
#endif

// How a page keeps its elements (Kept), and what queries and shares are (E).
struct Plain {
    using Kept = float;
    using E = float;
    static constexpr i64 kPer = 1;
    using Operand = Vec;
    static Operand operand(const Kept* p) { return load<Float::f32>(p, 0); }
    static Operand spread(const E* p) { return all(*p); }
    static Vec multiply_add(Vec acc, Operand a, Operand b) { return fma(a, b, acc); }
    static void put(E* p, Vec v) { load_store(p, v); }
    static void load_store(E* p, Vec v) { store<Float::f32>(p, 0, v); }
    static constexpr Float kType = Float::f32;
};
#if defined(__AVX512BF16__)
struct Half {
    using Kept = u16;
    using E = u16;
    static constexpr i64 kPer = 2;
    using Operand = __m512i;
    static Operand operand(const Kept* p) { return _mm512_loadu_si512(p); }
    static Operand spread(const E* p) {
        int pair;
        std::memcpy(&pair, p, 4);
        return _mm512_set1_epi32(pair);
    }
    static Vec multiply_add(Vec acc, Operand a, Operand b) {
        return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
    static void put(E* p, Vec v) { store<Float::bf16>(p, 0, v); }
    static constexpr Float kType = Float::bf16;
};
#else
struct Half : Plain {
    using Kept = u16;
    static Operand operand(const Kept* p) { return load<Float::bf16>(p, 0); }
};
#endif

template <class P>
static inline i64 deep(i64 width) { return ceil_div(width, P::kPer) * P::kPer; }
static inline i64 wide(i64 width) { return ceil_div(width, 16) * 16; }

i64 keys_bytes(i64 width, Float type) { return ceil_div(width, 2) * 2 * kPage * fourscore::FOURSCORE_ISA::width(type); }
i64 values_bytes(i64 width, Float type) { return wide(width) * kPage * fourscore::FOURSCORE_ISA::width(type); }

template <class P>
static inline void store_token(const void* key, const void* value, i64 width, Float type, const Pages& pages, i64 place) {
    using Kept = typename P::Kept;
    char* page = reinterpret_cast<char*>(pages.table[place / kPage]);
    i64 slot = place % kPage;
    Kept* keys = reinterpret_cast<Kept*>(page + pages.keys);
    Kept* values = reinterpret_cast<Kept*>(page + pages.values);
    auto element = [&](const void* p, i64 i) {
        Kept e;
        std::memcpy(&e, at(p, i, type), sizeof e);
        return e;
    };
    for (i64 i = 0; i < deep<P>(width); ++i) keys[(i / P::kPer * kPage + slot) * P::kPer + i % P::kPer] = i < width ? element(key, i) : Kept{};
    Kept* row = values + slot / P::kPer * wide(width) * P::kPer;
    for (i64 i = 0; i < wide(width); ++i) {
        row[i * P::kPer + slot % P::kPer] = i < width ? element(value, i) : Kept{};
        // The neighbour in the step may not be there yet: what an earlier sequence left could be no number.
        if (slot % P::kPer + 1 < P::kPer) row[i * P::kPer + 1] = Kept{};
    }
}

void store_any_token(const void* key, const void* value, i64 width, Float type, const Pages& pages, i64 place) {
    if (type == Float::bf16)
        store_token<Half>(key, value, width, type, pages, place);
    else
        store_token<Plain>(key, value, width, type, pages, place);
}

template <int N, class Body>
static inline void with_count(i64 n, const Body& body) {
    if constexpr (N == 1)
        body.template operator()<1>();
    else if (n == N)
        body.template operator()<N>();
    else
        with_count<N - 1>(n, body);
}

// acc[R][J] += R rows of a times J vectors of b, each vector from its own place.
template <class P, int R, int J>
static inline void accumulate(Vec (&acc)[R][J], const typename P::E* a, i64 a_row, const typename P::Kept* const (&b)[J], i64 b_step, i64 steps) {
    for (i64 s = 0; s < steps; ++s) {
        typename P::Operand w[J];
        for (int j = 0; j < J; ++j) w[j] = P::operand(b[j] + s * b_step);
        for (int i = 0; i < R; ++i) {
            typename P::Operand x = P::spread(a + i * a_row + s * P::kPer);
            for (int j = 0; j < J; ++j) acc[i][j] = P::multiply_add(acc[i][j], x, w[j]);
        }
    }
}

template <class P>
struct Attend {
    using E = typename P::E;
    using Kept = typename P::Kept;
    struct State {
        alignas(64) float score[kTogether * kKeys];
        E share[kTogether * kKeys];
        float most[kAttendRows], sum[kAttendRows];
    };
    const Group& g;
    const Pages& pages;
    i64 start, first, rows, deep_, wide_;
    State& s;
    E* query;  // [rows][deep]
    float* o;  // [rows][wide]

    i64 place(i64 row) const { return start + (first + row) / g.each; }

    // Scores of `count` rows from i on with the first `vectors` vectors of a tile's keys.
    void score(i64 i, i64 count, i64 tile, i64 vectors) const {
        with_count<kTogether>(count, [&]<int R>() {
            for (i64 v = 0; v < vectors; v += kAbreast)
                with_count<kAbreast>(least(kAbreast, vectors - v), [&]<int J>() {
                    const Kept* b[J];
                    for (int j = 0; j < J; ++j) {
                        i64 key = (v + j) * kLanes;
                        b[j] = reinterpret_cast<const Kept*>(pages.table[(tile * kKeys + key) / kPage] + pages.keys) + key % kPage * P::kPer;
                    }
                    Vec acc[R][J] = {};
                    accumulate<P, R, J>(acc, query + i * deep_, deep_, b, kPage * P::kPer, deep_ / P::kPer);
                    for (int r = 0; r < R; ++r)
                        for (int j = 0; j < J; ++j) store<Float::f32>(s.score, r * kKeys + (v + j) * kLanes, acc[r][j]);
                });
        });
    }

    // o = keep * o + shares times the values of the tile's first `seen` keys.
    void gather(i64 i, i64 count, i64 tile, i64 seen, const float* keep) const {
        with_count<kTogether>(count, [&]<int R>() {
            for (i64 v = 0; v < wide_ / kLanes; v += kAbreast)
                with_count<kAbreast>(least(kAbreast, wide_ / kLanes - v), [&]<int J>() {
                    Vec acc[R][J];
                    for (int r = 0; r < R; ++r)
                        for (int j = 0; j < J; ++j) acc[r][j] = load<Float::f32>(o, (i + r) * wide_ + (v + j) * kLanes) * keep[r];
                    for (i64 key = 0; key < seen; key += kPage) {
                        const Kept* values = reinterpret_cast<const Kept*>(pages.table[(tile * kKeys + key) / kPage] + pages.values);
                        const Kept* b[J];
                        for (int j = 0; j < J; ++j) b[j] = values + (v + j) * kLanes * P::kPer;
                        accumulate<P, R, J>(acc, s.share + key, kKeys, b, wide_ * P::kPer, ceil_div(least(kPage, seen - key), P::kPer));
                    }
                    for (int r = 0; r < R; ++r)
                        for (int j = 0; j < J; ++j) store<Float::f32>(o, (i + r) * wide_ + (v + j) * kLanes, acc[r][j]);
                });
        });
    }

    // Scores to shares, row by row; keep[r] is what earlier tiles' sums are multiplied with.
    void share(i64 i, i64 count, i64 tile, i64 vectors, float* keep) const {
        Ints lanes;
        for (int k = 0; k < kLanes; ++k) lanes[k] = k;
        const Vec never = all(-__builtin_inff());
        float change[kLanes] = {};
        Vec now[kTogether];
        for (i64 r = 0; r < count; ++r) {
            float* score = s.score + r * kKeys;
            i64 end = place(i + r) + 1 - tile * kKeys;  // keys of this tile from `begin` to `end` are seen
            i64 begin = g.window ? end - g.window : 0;
            Vec top = never;
            for (i64 v = 0; v < vectors; ++v) {
                Vec x = load<Float::f32>(score, v * kLanes) * g.scale;
                if (g.cap) x = g.cap * tangent(x / g.cap);
                if (end < (v + 1) * kLanes) x = lanes < static_cast<std::int32_t>(most(end - v * kLanes, 0)) ? x : never;
                if (begin > v * kLanes) x = lanes >= static_cast<std::int32_t>(least(begin - v * kLanes, kLanes)) ? x : never;
                store<Float::f32>(score, v * kLanes, x);
                top = larger(x, top);
            }
            float before = s.most[i + r], most_ = largest(top);
            most_ = most_ > before ? most_ : before;
            s.most[i + r] = most_;
            bool none = most_ == -__builtin_inff();  // nothing seen so far (the window begins later)
            change[r] = none ? 0 : before - most_;
            now[r] = all(none ? 0 : most_);
        }
        store<Float::f32>(keep, 0, exponential(load<Float::f32>(change, 0)));
        for (i64 r = 0; r < count; ++r) {
            Vec sum{};
            for (i64 v = 0; v < vectors; ++v) {
                Vec x = exponential(load<Float::f32>(s.score, r * kKeys + v * kLanes) - now[r]);
                P::put(s.share + r * kKeys + v * kLanes, x);
                sum += x;
            }
            s.sum[i + r] = s.sum[i + r] * keep[r] + add_up(sum);
        }
    }

    void run() const {
        i64 last = place(rows - 1), tile = g.window ? most(0, place(0) - g.window + 1) / kKeys : 0;
        for (; tile * kKeys <= last; ++tile)
            for (i64 i = 0; i < rows; i += kTogether) {
                i64 count = least(kTogether, rows - i), seen = least(kKeys, place(i + count - 1) + 1 - tile * kKeys);
                if (seen <= 0 || (g.window && place(i) - g.window + 1 >= (tile + 1) * kKeys)) continue;
                i64 vectors = ceil_div(seen, kLanes);
                float keep[kTogether + kLanes];
                score(i, count, tile, vectors);
                share(i, count, tile, vectors, keep);
                gather(i, count, tile, seen, keep);
            }
    }
};

template <class P>
static void attend_rows(const Group& g, const Pages& pages, const void* q, i64 q_stride, i64 start, i64 first, i64 rows, void* out, i64 out_stride) {
    using E = typename P::E;
    i64 d = g.width, deep_ = deep<P>(d), wide_ = wide(d);
    auto& state = *static_cast<typename Attend<P>::State*>(scratch(1, sizeof(typename Attend<P>::State)));
    E* query = static_cast<E*>(scratch(2, static_cast<std::size_t>(rows * deep_) * sizeof(E)));
    float* o = static_cast<float*>(scratch(3, static_cast<std::size_t>(rows * wide_) * sizeof(float)));
    for (i64 r = 0; r < rows; ++r) {
        const void* from = at(q, (first + r) / g.each * q_stride + (first + r) % g.each * d, g.type);
        for (i64 k = 0; k < deep_; ++k) {
            if constexpr (sizeof(E) == 2)
                std::memcpy(query + r * deep_ + k, k < d ? at(from, k, g.type) : "\0", 2);
            else
                query[r * deep_ + k] = k < d ? load_one(from, k, g.type) : 0;
        }
        state.most[r] = -__builtin_inff(), state.sum[r] = 0;
    }
    std::memset(o, 0, static_cast<std::size_t>(rows * wide_) * sizeof(float));
    Attend<P>{g, pages, start, first, rows, deep_, wide_, state, query, o}.run();
    with_type(g.type, [&]<Float T>() {
        for (i64 r = 0; r < rows; ++r) {
            void* to = at(out, (first + r) / g.each * out_stride + (first + r) % g.each * d, g.type);
            float share = 1.0f / state.sum[r];
            by_vectors(d, [&](i64 k, i64 count) { give<T>(to, k, count, load<Float::f32>(o, r * wide_ + k) * share); });
        }
    });
}

void attend(const Group& g, const Pages& pages, const void* q, i64 q_stride, i64 start, i64 first, i64 rows, void* out, i64 out_stride) {
    if (g.type == Float::bf16)
        attend_rows<Half>(g, pages, q, q_stride, start, first, rows, out, out_stride);
    else
        attend_rows<Plain>(g, pages, q, q_stride, start, first, rows, out, out_stride);
}

}  // namespace
}  // namespace fourscore::FOURSCORE_ISA
