// Products with dense matrices (ops.h, Product): linear layers that are not quantised, their gradients, and the adapters' skinny
// products. Columns of y are worked on in panels of some vectors; a panel of b is laid out with a column a lane while it is in
// cache, a chunk of k at a time.
//
// Order of summation, which makes rows batch-invariant: over k in turn, step by step (products.h), in one f32 sum. Nothing depends
// on m, on threads, or on how a and b lie in memory.
#pragma once

#include "ops.h"
#include "products.h"

namespace fourscore::FOURSCORE_ISA {
namespace {

constexpr i64 kDepth = 1024;       // k in a chunk: a panel's part of it stays in L2
constexpr i64 kFewDepth = 128;     // the same for so few rows that it should stay in L1
constexpr i64 kFewRows = 8;
constexpr i64 kAhead = 16;         // rows of b whose bytes are fetched ahead: pieces of a panel's size are too short a stream to be foreseen
constexpr i64 kProductRows = 512;  // rows of y a task works on at most: its unfinished sums stay in L2
constexpr i64 kPanel = kTileVectors * kLanes;

#if defined(__AVX512F__)
// Four 32-bit words of 16 rows, row(i) + offset: the first of all rows, the second of all, ...; quarters come by masked loads.
template <class Row>
static inline void four_words(const Row& row, i64 offset, __m512i* out) {
    __m512i z[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        auto quarter = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row(i) + offset)); };
        z[c] = _mm512_castsi128_si512(quarter(c));
        z[c] = _mm512_mask_broadcast_i32x4(z[c], 0x00f0, quarter(4 + c));
        z[c] = _mm512_mask_broadcast_i32x4(z[c], 0x0f00, quarter(8 + c));
        z[c] = _mm512_mask_broadcast_i32x4(z[c], 0xf000, quarter(12 + c));
    }
    __m512i low01 = _mm512_unpacklo_epi32(z[0], z[1]), high01 = _mm512_unpackhi_epi32(z[0], z[1]);
    __m512i low23 = _mm512_unpacklo_epi32(z[2], z[3]), high23 = _mm512_unpackhi_epi32(z[2], z[3]);
    out[0] = _mm512_unpacklo_epi64(low01, low23);
    out[1] = _mm512_unpackhi_epi64(low01, low23);
    out[2] = _mm512_unpacklo_epi64(high01, high23);
    out[3] = _mm512_unpackhi_epi64(high01, high23);
}

// Sixteen words of each row, which are read once: rows that lie multiples of 1 kB apart push each other out of L1.
template <class Row>
static inline void sixteen_words(const Row& row, i64 offset, __m512i* out) {
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(row(i) + offset);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            r[i + 2 * h] = _mm512_unpacklo_epi64(t[i + h], t[i + 2 + h]);
            r[i + 2 * h + 1] = _mm512_unpackhi_epi64(t[i + h], t[i + 2 + h]);
        }
    // r[4 q + c]: words c, 4 + c, 8 + c, 12 + c of rows 4 q to 4 q + 3.
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        __m512i low01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), high01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        __m512i low23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88), high23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        out[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        out[4 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        out[8 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        out[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
}
#endif

// 32-bit words of kLanes rows, kLanes from each: the first of all rows, the second of all, `apart` bytes between.
static inline void transpose(const char* const* rows, char* out, i64 apart) {
#if defined(__AVX512F__)
    for (i64 s = 0; s < 16; s += 4) {
        __m512i words[4];
        four_words([&](int i) { return rows[i]; }, 4 * s, words);
        for (int c = 0; c < 4; ++c) _mm512_storeu_si512(out + (s + c) * apart, words[c]);
    }
#elif defined(__AVX2__)
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows[i]));
    for (int i = 0; i < 8; i += 2) t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    for (int i = 0; i < 8; i += 4)
        for (int h = 0; h < 2; ++h) {
            r[i + 2 * h] = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0x44);
            r[i + 2 * h + 1] = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0xee);
        }
    for (int c = 0; c < 4; ++c) {
        _mm256_storeu_ps(reinterpret_cast<float*>(out + c * apart), _mm256_permute2f128_ps(r[c], r[4 + c], 0x20));
        _mm256_storeu_ps(reinterpret_cast<float*>(out + (4 + c) * apart), _mm256_permute2f128_ps(r[c], r[4 + c], 0x31));
    }
#else
    for (i64 s = 0; s < kLanes; ++s)
        for (i64 i = 0; i < kLanes; ++i) std::memcpy(out + s * apart + 4 * i, rows[i] + 4 * s, 4);
#endif
}

// `count` neighbours from p[i] on as elements of products with values of type `as`.
template <class P>
static inline void convert(const void* p, i64 i, i64 count, Float type, Float as, typename P::E* out) {
    with_type(type, [&]<Float T>() {
        with_type(as, [&]<Float A>() {
            each_vector<T>(count, [&](i64 at, i64 n) {
                Vec v = load_up_to<T>(p, i + at, n);
                if (T != A) v = round_to<A>(v);
                if (n == kLanes) return P::put(out + at, v);
                typename P::E last[kLanes];
                P::put(last, v);
                std::memcpy(out + at, last, static_cast<std::size_t>(n) * sizeof(typename P::E));
            });
        });
    });
}

template <class P>
struct Dense {
    using E = typename P::E;
    const Product& p;
    i64 chunk, rows;  // of k; of y for a task (few rows: of b)
    const E* a;       // a[i, step s] at a_row * i + a_step * s
    i64 a_row, a_step;
    E* laid_out;

    static constexpr Float kStored = P::kPer == 2 ? Float::bf16 : Float::f32;  // what E is
    static constexpr i64 kTogether = 16;                                       // rows, or steps, of a laid out by a task

    // a by rows, the last step filled up with zeros.
    static void lay_out_rows(void* job, i64 task) {
        Dense& d = *static_cast<Dense*>(job);
        for (i64 i = task * kTogether; i < least(d.p.m, (task + 1) * kTogether); ++i) {
            E* out = d.laid_out + i * d.a_row;
            convert<P>(d.p.a, i * d.p.a_row, d.p.k, d.p.a_type, d.p.a_type, out);
            for (i64 s = d.p.k; s < d.a_row; ++s) out[s] = 0;
        }
    }
    // a by steps: a step's values of all rows.
    static void lay_out_steps(void* job, i64 task) {
        Dense& d = *static_cast<Dense*>(job);
        E* beside = static_cast<E*>(scratch(3, static_cast<std::size_t>(P::kPer * d.p.m) * sizeof(E)));
        for (i64 s = task * kTogether; s < least(ceil_div(d.p.k, P::kPer), (task + 1) * kTogether); ++s)
            step_of(d.p.a, d.p.a_step, d.p.a_type, d.p.a_type, 0, d.p.m, s, d.p.k, beside, d.laid_out + s * d.a_step);
    }

    // Step s of columns j to j + count: kPer neighbouring rows of a matrix [k, columns] side by side.
    static void step_of(const void* from, i64 stride, Float type, Float as, i64 j, i64 count, i64 s, i64 k, E* beside, E* out) {
        if constexpr (P::kPer == 1) {
            convert<P>(from, s * stride + j, count, type, as, out);
        } else {
            const E* rows[2] = {beside, beside + count};
            for (i64 e = 0; e < 2; ++e) {
                if (2 * s + e >= k)
                    std::memset(beside + e * count, 0, static_cast<std::size_t>(count) * sizeof(E));
                else if (type == kStored)
                    rows[e] = static_cast<const E*>(from) + (2 * s + e) * stride + j;
                else
                    convert<P>(from, (2 * s + e) * stride + j, count, type, as, beside + e * count);
            }
            i64 i = 0;
            for (; i + kLanes <= count; i += kLanes) {
                Halves first, second;
                std::memcpy(&first, rows[0] + i, sizeof first);
                std::memcpy(&second, rows[1] + i, sizeof second);
                Bits both = __builtin_convertvector(first, Bits) | __builtin_convertvector(second, Bits) << 16;
                std::memcpy(out + 2 * i, &both, sizeof both);
            }
            for (; i < count; ++i) out[2 * i] = rows[0][i], out[2 * i + 1] = rows[1][i];
        }
    }

    // Columns j to j + vectors * kLanes of b, k from k0 on: [step][column][per]. Past the last column: anything.
    void pack(i64 j, i64 vectors, i64 k0, i64 count, E* panel) const {
        i64 step_size = vectors * kLanes * P::kPer, steps = ceil_div(count, P::kPer), columns = least(vectors * kLanes, p.n - j);
        if (p.b_row == 1) {
            E* beside = static_cast<E*>(scratch(3, static_cast<std::size_t>(P::kPer * kPanel) * sizeof(E)));
            for (i64 s = 0; s < steps; ++s) {
                for (i64 e = 0; e < P::kPer; ++e)
                    for (i64 byte = 0; byte < columns * width(p.b_type); byte += 64)
                        __builtin_prefetch(static_cast<const char*>(at(p.b, (k0 + s * P::kPer + e + kAhead) * p.b_step + j, p.b_type)) + byte);
                step_of(at(p.b, k0 * p.b_step, p.b_type), p.b_step, p.b_type, p.a_type, j, columns, s, count, beside, panel + s * step_size);
            }
            return;
        }
        bool direct = p.b_type == kStored && p.a_type == kStored;
        E* converted = direct ? nullptr : static_cast<E*>(scratch(3, static_cast<std::size_t>(kLanes * count) * sizeof(E)));
        for (i64 v = 0; v < vectors; ++v) {
            const char* rows[kLanes];
            for (i64 i = 0; i < kLanes; ++i) {
                i64 from = least(j + v * kLanes + i, p.n - 1) * p.b_row + k0;
                if (direct) {
                    rows[i] = static_cast<const char*>(at(p.b, from, p.b_type));
                } else {
                    convert<P>(p.b, from, count, p.b_type, p.a_type, converted + i * count);
                    rows[i] = reinterpret_cast<const char*>(converted + i * count);
                }
            }
            E* out = panel + v * kLanes * P::kPer;
            const i64 ahead = kLanes * p.b_row * width(p.b_type);
            i64 s = 0;
            for (; s + kLanes <= count / P::kPer; s += kLanes) {
                if (direct)
                    for (const char* r : rows) __builtin_prefetch(r + ahead);
                transpose(rows, reinterpret_cast<char*>(out + s * step_size), step_size * static_cast<i64>(sizeof(E)));
                for (const char*& r : rows) r += 4 * kLanes;
            }
            if (s == steps) continue;
            char last[kLanes][4 * kLanes] = {}, turned[kLanes][4 * kLanes];
            for (i64 i = 0; i < kLanes; ++i) {
                std::memcpy(last[i], rows[i], static_cast<std::size_t>(count - s * P::kPer) * sizeof(E));
                rows[i] = last[i];
            }
            transpose(rows, turned[0], 4 * kLanes);
            for (i64 i = 0; s < steps; ++s, ++i) std::memcpy(out + s * step_size, turned[i], sizeof turned[i]);
        }
    }

    // R rows from i on, J vectors from column j on.
    template <int R, int J>
    void finish(const Vec (&acc)[R][J], i64 i, i64 j) const {
        with_type(p.y_type, [&]<Float T>() {
            for (int v = 0; v < J; ++v) {
                i64 first = j + v * kLanes, n = least(kLanes, p.n - first);
                Vec bias = p.bias ? load_up_to<Float::f32>(p.bias, first, n) : Vec{};
                for (int r = 0; r < R; ++r) {
                    Vec sum = acc[r][v] * p.scale + bias;
                    i64 to = (i + r) * p.y_row + first * p.y_column;
                    if (p.y_column == 1) {
                        store_up_to<T>(p.y, to, n, p.add ? load_up_to<T>(p.y, to, n) + sum : sum);
                    } else {
                        float lanes[kLanes];
                        store<Float::f32>(lanes, 0, sum);
                        for (i64 l = 0; l < n; ++l, to += p.y_column)
                            store_one(p.y, to, T, p.add ? load_one(p.y, to, T) + lanes[l] : lanes[l]);
                    }
                }
            }
        });
    }

    // The same rows and columns, one chunk. c: unfinished sums.
    template <int R, int J>
    void tile(i64 i, i64 j, i64 k0, i64 count, const E* panel, float* c) const {
        Vec acc[R][J];
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < J; ++v) acc[r][v] = k0 ? load<Float::f32>(c, (r * J + v) * kLanes) : Vec{};
        const E* x = a + i * a_row + k0 / P::kPer * a_step;
        const E* end = panel + ceil_div(count, P::kPer) * J * kLanes * P::kPer;
        for (const E* b = panel; b != end; b += J * kLanes * P::kPer, x += a_step) {
            typename P::Operand w[J];
            for (int v = 0; v < J; ++v) w[v] = P::operand(b + v * kLanes * P::kPer);
            for (int r = 0; r < R; ++r) {
                typename P::Operand spread = P::spread(x + r * a_row);
                for (int v = 0; v < J; ++v) acc[r][v] = P::multiply_add(acc[r][v], spread, w[v]);
            }
        }
        if (k0 + count < p.k) {
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < J; ++v) store<Float::f32>(c, (r * J + v) * kLanes, acc[r][v]);
            return;
        }
        finish<R, J>(acc, i, j);
    }

#if defined(__AVX512F__)
    static constexpr i64 kFewVectors = 2;

    // Few rows of a: b is put in order on the way, `Words` at a time; nothing of it is stored. Columns in whole vectors.
    template <int R, int Words>
    void few(i64 i, i64 j) const {
        Vec acc[R][kFewVectors];
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < kFewVectors; ++v) acc[r][v] = Vec{};
        const i64 row = p.b_row * static_cast<i64>(sizeof(E)), steps = p.k / P::kPer;
        const char* first = static_cast<const char*>(p.b) + j * row;
        const E* x = a + i * a_row;
        for (i64 s = 0; s < steps; s += Words) {
            // Columns to come, as for NF4: a row alone is too short a stream for the machine to foresee the next.
            if (s % 16 == 0 && i == 0)
                for (i64 l = 0; l < kFewVectors * kLanes; ++l) __builtin_prefetch(first + (kFewVectors * kLanes + l) * row + 4 * s, 0, 2);
#pragma GCC unroll 2
            for (int v = 0; v < kFewVectors; ++v) {
                __m512i words[Words];
                auto of = [&](int l) { return first + (v * kLanes + l) * row; };
                if constexpr (Words == 4)
                    four_words(of, 4 * s, words);
                else
                    sixteen_words(of, 4 * s, words);
#pragma GCC unroll 16
                for (int c = 0; c < Words; ++c)
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r)
                        acc[r][v] = P::multiply_add(acc[r][v], P::spread(x + r * a_row + (s + c) * P::kPer), typename P::Operand(words[c]));
            }
        }
        finish<R, kFewVectors>(acc, i, j);
    }

    template <int Words>
    static void multiply_few(void* job, i64 task) {
        const Dense& d = *static_cast<Dense*>(job);
        constexpr int kRows = 4;
        for (i64 j = task * d.rows; j < least(d.p.n, (task + 1) * d.rows); j += kFewVectors * kLanes)
            for (i64 i = 0; i < d.p.m; i += kRows)
                with_number<kRows>(least(kRows, d.p.m - i), [&]<int R>() { d.template few<R, Words>(i, j); });
    }
#endif

    // A panel for some rows.
    static void multiply(void* job, i64 task) {
        const Dense& d = *static_cast<Dense*>(job);
        i64 panels = ceil_div(d.p.n, kPanel), j = task % panels * kPanel, i0 = task / panels * d.rows, end = least(d.p.m, i0 + d.rows);
        i64 vectors = ceil_div(least(kPanel, d.p.n - j), kLanes), steps = ceil_div(d.chunk, P::kPer);
        E* panel = static_cast<E*>(scratch(1, static_cast<std::size_t>(steps * P::kPer * vectors * kLanes) * sizeof(E)));
        bool whole = d.chunk >= d.p.k;
        float* c = whole ? nullptr : static_cast<float*>(scratch(2, static_cast<std::size_t>(d.rows * vectors * kLanes) * sizeof(float)));
        for (i64 k0 = 0; k0 < d.p.k; k0 += d.chunk) {
            i64 count = least(d.chunk, d.p.k - k0);
            d.pack(j, vectors, k0, count, panel);
            with_number<kTileVectors>(vectors, [&]<int J>() {
                // Fewer vectors, more rows: enough sums to hide the latency of one.
                constexpr int kRows = J == kTileVectors ? kTileRows : kTileRows + 2;
                for (i64 i = i0; i < end; i += kRows)
                    with_number<kRows>(least(kRows, end - i), [&]<int R>() {
                        d.template tile<R, J>(i, j, k0, count, panel, c ? c + (i - i0) * vectors * kLanes : nullptr);
                    });
            });
        }
    }

    void go(int threads) {
        i64 steps = ceil_div(p.k, P::kPer);
        if (p.a_step == 1 && p.a_type == kStored && p.k % P::kPer == 0) {
            a = static_cast<const E*>(p.a), a_row = p.a_row, a_step = P::kPer;
        } else {
            laid_out = static_cast<E*>(scratch(0, static_cast<std::size_t>(p.m * steps * P::kPer) * sizeof(E)));
            bool by_rows = p.a_step == 1;
            a = laid_out, a_row = by_rows ? steps * P::kPer : P::kPer, a_step = by_rows ? P::kPer : p.m * P::kPer;
            run(threads, ceil_div(by_rows ? p.m : steps, kTogether), by_rows ? lay_out_rows : lay_out_steps, this);
        }
#if defined(__AVX512F__)
        constexpr i64 kColumns = kFewVectors * kLanes;
        const bool in_order = p.b_step == 1 && p.b_type == kStored && p.a_type == kStored && a_step == P::kPer;
        if (p.m <= kFewRows && in_order && p.k % (4 * P::kPer) == 0 && p.n % kColumns == 0) {
            rows = least(4, ceil_div(p.n / kColumns, 4 * threads)) * kColumns;
            bool apart = p.b_row * static_cast<i64>(sizeof(E)) % 1024 == 0 && p.k % (16 * P::kPer) == 0;
            return run(threads, ceil_div(p.n, rows), apart ? multiply_few<16> : multiply_few<4>, this);
        }
#endif
        // Some tasks for each thread, so that they can share.
        i64 panels = ceil_div(p.n, kPanel), wanted = ceil_div(4 * threads, panels);
        rows = least(kProductRows, most(8 * kTileRows, ceil_div(ceil_div(p.m, wanted), kTileRows) * kTileRows));
        run(threads, panels * ceil_div(p.m, rows), multiply, this);
    }
};

template <class P>
static inline void product_of(const Product& p, int threads) {
    i64 chunks = ceil_div(p.k, p.m > kFewRows ? kDepth : kFewDepth);
    Dense<P> d{p, ceil_div(ceil_div(p.k, chunks), 2 * kLanes) * 2 * kLanes, 0, nullptr, 0, 0, nullptr};
    // Small products are not worth waking a thread for.
    d.go(static_cast<int>(least(threads, 1 + p.m * p.n * p.k / (i64{1} << 21))));
}

void product(const Product& p, int threads) {
#if defined(__AVX512BF16__)
    if (p.a_type == Float::bf16) return product_of<Pairs>(p, threads);
#endif
    product_of<Singles>(p, threads);
}

}  // namespace
}  // namespace fourscore::FOURSCORE_ISA
