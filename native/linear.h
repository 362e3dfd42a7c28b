// y = x W^T + bias and dx = dy W, W packed. Templates over a backend's Ops:
//
//   E, Vec, Acc       element, a vector of kWidth elements, a vector of kLanes f32 sums
//   kPer              rows of W that share a vector (2 for bf16: half a vector each; backward multiplies them as pairs)
//   kRows             rows of x in a register tile (beside 4 vectors of W)
//   Few               the Ops (kPer = 1, same order of sums) and kFewRows: for so few rows W is decoded on the way
//   kChunkUnits       units of k that one f32 sum covers before it is added to the result (a register tile's rows fit L1)
//   load load_x zero fma sums   dot product over k; sums<R, J> adds up the lanes of R x J sums, in a fixed order
//   scales table decode         of neighbouring blocks; the values a code can have; packed bytes -> vectors of a unit
//   decode2                     the same for two rows (Few)
//   multiply                    optional (Few): a unit of J rows decoded and added to R x J sums in one go, in place of decode2 and fma
//   place lay_out natural       a unit from natural order to the order of `decode`, for W (kPer rows) and x; and back
//   columns spread              vectors of W and dy for backward, whose lanes run along k
//
// Order of summation, which makes rows batch-invariant: an output's sum runs over k in chunks whose size depends on K alone;
// in a chunk over vectors in turn, lane by lane; then over lanes in a fixed tree; then chunks in turn; then the bias. Nothing
// in this depends on the number of rows, of threads, or on which path (packed nibbles or a decoded tile) was taken.
#pragma once

#include "portable.h"

namespace fourscore::FOURSCORE_ISA {

constexpr i64 kTileOutputs = 48;  // outputs decoded at a time: x is read from beyond L2 once for each tile
constexpr i64 kAhead = 16;        // rows of W between what is read and what is fetched
constexpr i64 kSmallTile = 16384;  // bytes of a tile that stays in L1
constexpr i64 kSmallBatch = 1 << 18;  // bytes of x that stay in L2 beside it
constexpr i64 kBlockRows = 512;   // rows of x laid out at a time
constexpr i64 kBackUnits = 2;     // units of k in a tile of backward: a whole cache line of packed codes
constexpr i64 kBackSteps = 512;   // steps (kPer rows of W) in a tile of backward

template <class O>
constexpr int kVectors = kUnit * O::kPer / O::kWidth;  // vectors a unit of kPer rows takes

// Can units be decoded straight from memory? Otherwise they go through plain_unit.
static inline bool aligned_units(const Weight& w) { return w.cols % kUnit == 0 && w.block % kUnit == 0; }

template <class O>
inline void unit_scales(const Weight& w, i64 row, i64 unit, i64 count, float* out) {
    i64 first = (row * w.cols) / kUnit + unit, per_block = w.block / kUnit;
    if (per_block == 1) return O::scales(w, first, count, out);
    for (i64 i = 0; i < count; ++i) out[i] = scale_of(w, (first + i) / per_block);
}

// kPer rows on their way to being decoded: where their bytes are, and the scales of their units.
template <class O, int Units>
struct Packed {
    const u8* bytes[O::kPer];
    float scales[O::kPer][Units];

    // rows: row, row + apart; past the last row: the last row again, whose products nobody uses.
    void point(const Weight& w, i64 row, i64 apart, i64 unit, i64 count) {
        for (int r = 0; r < O::kPer; ++r) {
            i64 n = least(row + r * apart, w.rows - 1);
            bytes[r] = w.packed + (n * w.cols + unit * kUnit) / 2;
            unit_scales<O>(w, n, unit, count, scales[r]);
        }
    }
    void decode(i64 u, Float round, typename O::Vec* out) const {
        float s[O::kPer];
        const u8* b[O::kPer];
        for (int r = 0; r < O::kPer; ++r) s[r] = scales[r][u], b[r] = bytes[r] + u * 32;
        O::decode(b, O::table(s, round), out);
    }
};

// Calls f(u, vectors) for `count` units from `unit` on of rows row and row + apart.
template <class O, class F>
inline void decode_units(const Weight& w, i64 row, i64 apart, i64 unit, i64 count, Float round, F&& f) {
    typename O::Vec v[kVectors<O>];
    if (aligned_units(w)) {
        Packed<O, O::kChunkUnits> packed;
        packed.point(w, row, apart, unit, count);
        for (i64 u = 0; u < count; ++u) {
            packed.decode(u, round, v);
            f(u, v);
        }
    } else {
        for (i64 u = 0; u < count; ++u) {
            float natural[O::kPer][kUnit];
            for (int r = 0; r < O::kPer; ++r)
                plain_unit(w, least(row + r * apart, w.rows - 1), (unit + u) * kUnit, round, natural[r]);
            O::place(natural, v);
            f(u, v);
        }
    }
}

// A row of x in the backend's element type and order, padded with zeros to whole units.
template <class O>
void lay_out_row(const void* x, Float type, i64 cols, typename O::E* out) {
    i64 whole = cols / kUnit;
    for (i64 u = 0; u < whole; ++u) O::lay_out(at(x, u * kUnit, type), type, out + u * kUnit);
    if (cols % kUnit) {
        alignas(64) u32 padded[kUnit] = {};  // bytes, enough for either width
        std::memcpy(padded, at(x, whole * kUnit, type), static_cast<std::size_t>(cols % kUnit * width(type)));
        O::lay_out(padded, type, out + whole * kUnit);
    }
}

// Where the sums of R rows by some outputs go. Unfinished ones wait in c, together; finished ones go to y.
struct Destination {
    void* y;
    i64 y_stride, outputs;
    const float* bias;
    Float type;
};

template <class O, int R, int kOutputs>
inline void finish(float* sums, float* c, bool first, bool last, const Destination& d) {
    if (!first)
        for (int i = 0; i < R * kOutputs; ++i) sums[i] = c[i] + sums[i];
    if (!last) {
        std::memcpy(c, sums, R * kOutputs * sizeof(float));
    } else if (d.outputs >= kOutputs) {
        for (int i = 0; i < R; ++i) O::template store_outputs<kOutputs>(sums + i * kOutputs, d.bias, at(d.y, i * d.y_stride, d.type), d.type);
    } else {
        for (int i = 0; i < R; ++i) O::store_row(sums + i * kOutputs, d.bias, d.outputs, at(d.y, i * d.y_stride, d.type), d.type);
    }
}

// sums = R rows of x times 4 vectors' rows of a decoded tile [4][vectors][kWidth].
template <class O, int R>
inline void dot_tile(const typename O::E* x, i64 x_stride, const typename O::E* w, i64 vectors, float* sums) {
    typename O::Acc acc[R][4];
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < 4; ++j) acc[i][j] = O::zero();
    for (i64 v = 0; v < vectors; ++v) {
        typename O::Vec wv[4];
        for (int j = 0; j < 4; ++j) wv[j] = O::load(w + (j * vectors + v) * O::kWidth);
        for (int i = 0; i < R; ++i) {
            typename O::Vec xv = O::load_x(x + i * x_stride + v * (O::kWidth / O::kPer));
            for (int j = 0; j < 4; ++j) acc[i][j] = O::fma(acc[i][j], xv, wv[j]);
        }
    }
    O::template sums<R, 4>(acc, sums);
}

// What lies kAhead rows behind the rows at hand, on its way from memory to L2: J units' worth at a time, in the order of memory.
template <int J>
inline void fetch_ahead(const Weight& w, i64 n, i64 step) {
    const u8* p = w.packed + (n + kAhead) * (w.cols / 2) + step * (J * 32);
#pragma GCC unroll 8
    for (int line = 0; line < J * 32; line += 64) __builtin_prefetch(p + line, 0, 2);
}

// The scales of the J rows that lie kAhead rows behind row n.
template <int J>
inline void fetch_scales(const Weight& w, i64 n) {
    i64 per_row = w.cols / w.block, width = w.scales ? sizeof(float) : 1;
    const char* p = (w.scales ? reinterpret_cast<const char*>(w.scales) : reinterpret_cast<const char*>(w.codes)) + (n + kAhead) * per_row * width;
    for (i64 line = 0; line < J * per_row * width; line += 64) __builtin_prefetch(p + line, 0, 2);
}

// The same product for outputs n .. n + J - 1, decoded on the way. Past the last row: the last again, whose sums nobody uses.
template <class O, int R, int J>
inline void dot_packed(const Weight& w, Float round, i64 n, const typename O::E* x, i64 x_stride, i64 units, i64 chunk,
                       const Destination& d) {
    static_assert(O::kPer == 1);
    alignas(64) float sums[R * J], c[R * J];
    i64 here = least(J, w.rows - n);
    float* scales = static_cast<float*>(scratch(1, static_cast<std::size_t>(here * units) * sizeof(float)));
    unit_scales<O>(w, n, 0, here * units, scales);  // the rows' units follow each other
    fetch_scales<J>(w, n);
    const float* scale[J];
    const u8* bytes[J];
    for (int j = 0; j < J; ++j) {
        scale[j] = scales + least(j, here - 1) * units;
        bytes[j] = w.packed + (n + least(j, here - 1)) * w.cols / 2;
    }
    for (i64 u0 = 0; u0 < units; u0 += chunk) {
        i64 end = least(units, u0 + chunk);
        typename O::Acc acc[R][J];
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < J; ++j) acc[i][j] = O::zero();
        for (i64 u = u0; u < end; ++u) {
            const typename O::E* xu = x + u * kUnit;
            // Rows to come, on their way from memory to L2: one row alone is too short a stream for the machine to foresee the next.
            if (u % 2 == 0) {
#pragma GCC unroll 8
                for (int j = 0; j < J; ++j) __builtin_prefetch(bytes[j] + J * w.cols + u * 32, 0, 2);
            }
            if constexpr (requires { O::template multiply<R, J>(bytes, scale, u, xu, x_stride, acc); }) {
                O::template multiply<R, J>(bytes, scale, u, xu, x_stride, acc);
            } else {
                // A few rows of W at a time, so that additions to one sum do not follow each other.
                constexpr int kTogether = R == 1 ? 8 : R <= 3 ? 4 : 2;
#pragma GCC unroll 8
                for (int j0 = 0; j0 < J; j0 += kTogether) {
                    typename O::Vec v[kTogether][kVectors<O>];
#pragma GCC unroll 8
                    for (int j = 0; j < kTogether; j += 2) {
                        const u8* b[2] = {bytes[j0 + j] + u * 32, bytes[j0 + j + 1] + u * 32};
                        const float s[2] = {scale[j0 + j][u], scale[j0 + j + 1][u]};
                        O::decode2(b, s, round, v[j], v[j + 1]);
                    }
#pragma GCC unroll 16
                    for (int h = 0; h < kVectors<O>; ++h)
#pragma GCC unroll 8
                        for (int i = 0; i < R; ++i) {
                            typename O::Vec xv = O::load_x(xu + i * x_stride + h * O::kWidth);
#pragma GCC unroll 8
                            for (int j = 0; j < kTogether; ++j) acc[i][j0 + j] = O::fma(acc[i][j0 + j], xv, v[j][h]);
                        }
                }
            }
        }
        O::template sums<R, J>(acc, sums);
        finish<O, R, J>(sums, c, u0 == 0, end == units, d);
    }
}

// Calls f<R>() for R = `rows` in 1 .. Max.
template <int Max, class F>
inline void with_rows(i64 rows, F&& f) {
    if constexpr (Max > 1) {
        if (rows < Max) return with_rows<Max - 1>(rows, f);
    }
    f.template operator()<Max>();
}

// Small products are not worth waking a thread for.
static inline int useful_threads(int threads, i64 rows, const Weight& w) {
    i64 work = most(rows, 8) * w.rows * w.cols;
    return static_cast<int>(least(threads, 1 + work / (i64{1} << 21)));
}

constexpr i64 kRowsATask = 16;  // rows of x laid out by a task

template <class O>
struct Forward {
    using E = typename O::E;
    static constexpr int kOutputs = 4 * O::kPer;
    const Weight& w;
    const void* x;
    i64 rows, x_stride;
    Float type;
    const float* bias;
    void* y;
    E* laid_out;
    i64 units, chunk, tile, pass;  // outputs of a task; of these, outputs decoded at a time

    Destination destination(i64 row, i64 n, i64 end) const {
        return {at(y, row * w.rows + n, type), w.rows, end - n, bias ? bias + n : nullptr, type};
    }

    static void lay_out(void* p, i64 task) {
        Forward& f = *static_cast<Forward*>(p);
        for (i64 i = task * kRowsATask; i < least(f.rows, (task + 1) * kRowsATask); ++i)
            lay_out_row<O>(at(f.x, i * f.x_stride, f.type), f.type, f.w.cols, f.laid_out + i * f.units * kUnit);
    }

    static void few_rows(void* p, i64 task) {
        Forward& f = *static_cast<Forward*>(p);
        i64 end = least(f.w.rows, (task + 1) * f.tile);
        with_rows<O::kFewRows>(f.rows, [&]<int R>() {
            constexpr int J = R <= 2 ? 8 : 4;  // enough sums at a time to hide an addition's latency
            for (i64 n = task * f.tile; n < end; n += J)
                dot_packed<typename O::Few, R, J>(f.w, f.type, n, f.laid_out, f.units * kUnit, f.units, f.chunk, f.destination(0, n, end));
        });
    }

    static void many_rows(void* p, i64 task) {
        Forward& f = *static_cast<Forward*>(p);
        i64 end = least(f.w.rows, (task + 1) * f.tile);
        for (i64 n = task * f.tile; n < end; n += f.pass) f.decoded_tile(n, least(end, n + f.pass));
    }

    void decoded_tile(i64 n0, i64 end) const {
        i64 groups = ceil_div(end - n0, kOutputs), x_stride = units * kUnit;
        // As few groups of rows as registers allow, of even size: a small one would not hide its loads.
        i64 row_groups = ceil_div(rows, O::kRows), size = rows / row_groups, larger = rows % row_groups;
        E* decoded = static_cast<E*>(scratch(1, static_cast<std::size_t>(groups * kOutputs * chunk * kUnit) * sizeof(E)));
        // Unfinished sums, as the register tiles leave them.
        float* c = static_cast<float*>(scratch(2, static_cast<std::size_t>(rows * groups * kOutputs) * sizeof(float)));
        for (i64 u0 = 0; u0 < units; u0 += chunk) {
            i64 count = least(chunk, units - u0), vectors = count * kVectors<O>;
            for (i64 g = 0; g < groups; ++g)
                for (i64 j = 0; j < 4; ++j) {
                    E* to = decoded + (g * 4 + j) * vectors * O::kWidth;
                    decode_units<O>(w, n0 + g * kOutputs + j, 4, u0, count, type, [&](i64 u, const typename O::Vec* v) {
                        if (pass < kTileOutputs) fetch_ahead<O::kPer>(w, n0 + g * kOutputs, u0 * 4 + j * count + u);
                        for (int h = 0; h < kVectors<O>; ++h) O::store(to + (u * kVectors<O> + h) * O::kWidth, v[h]);
                    });
                }
            for (i64 group = 0, i = 0; group < row_groups; ++group) {
                i64 here = size + (group < larger);
                with_rows<O::kRows>(here, [&]<int R>() {
                    for (i64 g = 0; g < groups; ++g) {
                        alignas(64) float sums[R * kOutputs];
                        dot_tile<O, R>(laid_out + i * x_stride + u0 * kUnit, x_stride, decoded + g * 4 * vectors * O::kWidth, vectors, sums);
                        finish<O, R, kOutputs>(sums, c + (i * groups + g * R) * kOutputs, u0 == 0, u0 + count == units,
                                               destination(i, n0 + g * kOutputs, end));
                    }
                });
                i += here;
            }
        }
    }
};

template <class O>
void forward(const Weight& w, const void* x, i64 m, i64 x_stride, Float type, const float* bias, void* y, int threads) {
    constexpr i64 kOutputs = 4 * O::kPer;
    i64 units = ceil_div(w.cols, kUnit), chunk = ceil_div(units, ceil_div(units, O::kChunkUnits));
    threads = useful_threads(threads, m, w);
    // Some tasks for each thread, so that they can share; whole register tiles.
    i64 groups = ceil_div(w.rows, kOutputs);
    i64 tile = least(kTileOutputs, most(1, ceil_div(groups, 2 * threads)) * kOutputs);
    i64 small = most(1, kSmallTile / (kOutputs * chunk * kUnit * static_cast<i64>(sizeof(typename O::E)))) * kOutputs;
    for (i64 m0 = 0; m0 < m; m0 += kBlockRows) {
        i64 rows = least(kBlockRows, m - m0);
        std::size_t bytes = static_cast<std::size_t>(rows * units * kUnit) * sizeof(typename O::E);
        void* laid_out = scratch(0, bytes);
        // A small batch is read again for every few outputs, and a weight's rows in order, long enough at a time to be foreseen.
        bool small_batch = bytes <= kSmallBatch;
        i64 per_task = small_batch ? most(tile, groups / (8 * threads) * kOutputs) : tile;
        Forward<O> f{w,
                     at(x, m0 * x_stride, type),
                     rows,
                     x_stride,
                     type,
                     bias,
                     at(y, m0 * w.rows, type),
                     static_cast<typename O::E*>(laid_out),
                     units,
                     chunk,
                     per_task,
                     small_batch ? small : per_task};
        run(threads, ceil_div(rows, kRowsATask), Forward<O>::lay_out, &f);
        bool few = rows <= O::kFewRows && aligned_units(w);
        run(threads, ceil_div(w.rows, per_task), few ? Forward<O>::few_rows : Forward<O>::many_rows, &f);
    }
}

// c[i][4 vectors] = sum over steps of dy[i][step] * w[step][4 vectors]; continues from c when `add`.
template <class O, int R>
inline void outer_tile(const typename O::E* dy, i64 dy_stride, const typename O::E* w, i64 steps, float* c, i64 c_stride, bool add) {
    typename O::Acc acc[R][4];
    for (int i = 0; i < R; ++i)
        for (int v = 0; v < 4; ++v) acc[i][v] = add ? O::load_acc(c + i * c_stride + v * O::kLanes) : O::zero();
    for (i64 s = 0; s < steps; ++s) {
        typename O::Vec wv[4];
        for (int v = 0; v < 4; ++v) wv[v] = O::load(w + (s * 4 + v) * O::kWidth);
        for (int i = 0; i < R; ++i) {
            typename O::Vec d = O::spread(dy + i * dy_stride, s);
            for (int v = 0; v < 4; ++v) acc[i][v] = O::fma(acc[i][v], d, wv[v]);
        }
    }
    for (int i = 0; i < R; ++i)
        for (int v = 0; v < 4; ++v) O::store_acc(c + i * c_stride + v * O::kLanes, acc[i][v]);
}

template <class O>
struct Backward {
    using E = typename O::E;
    static constexpr i64 kQuads = kVectors<O> / 4, kSpan = kUnit / kQuads;  // groups of 4 vectors in a unit; the k they cover
    const Weight& w;
    const void* dy;
    i64 rows, dy_stride;
    Float type;
    void* dx;
    E* converted;
    i64 steps, units;

    static void convert(void* p, i64 task) {
        Backward& b = *static_cast<Backward*>(p);
        i64 padded = b.steps * O::kPer;
        for (i64 i = task * kRowsATask; i < least(b.rows, (task + 1) * kRowsATask); ++i)
            O::convert(at(b.dy, i * b.dy_stride, b.type), b.type, b.w.rows, padded, b.converted + i * padded);
    }

    static void columns(void* p, i64 task) {
        Backward& b = *static_cast<Backward*>(p);
        i64 u0 = task * kBackUnits, count = least(kBackUnits, b.units - u0), c_stride = count * kUnit, d_stride = b.steps * O::kPer;
        // [unit][quad][step][4 vectors]
        E* tile = static_cast<E*>(scratch(1, static_cast<std::size_t>(count * kUnit * kBackSteps * O::kPer) * sizeof(E)));
        float* c = static_cast<float*>(scratch(2, static_cast<std::size_t>(b.rows * c_stride) * sizeof(float)));
        for (i64 s0 = 0; s0 < b.steps; s0 += kBackSteps) {
            i64 now = least(kBackSteps, b.steps - s0);
            for (i64 s = 0; s < now; ++s)
                decode_units<O>(b.w, (s0 + s) * O::kPer, 1, u0, count, b.type, [&](i64 u, const typename O::Vec* v) {
                    for (int h = 0; h < kVectors<O>; ++h)
                        O::store(tile + (((u * kQuads + h / 4) * kBackSteps + s) * 4 + h % 4) * O::kWidth, O::columns(v[h]));
                });
            for (i64 i = 0; i < b.rows; i += O::kRows)
                with_rows<O::kRows>(least(O::kRows, b.rows - i), [&]<int R>() {
                    for (i64 q = 0; q < count * kQuads; ++q)
                        outer_tile<O, R>(b.converted + i * d_stride + s0 * O::kPer, d_stride, tile + q * kBackSteps * 4 * O::kWidth, now,
                                         c + i * c_stride + q * kSpan, c_stride, s0 > 0);
                });
        }
        i64 k = u0 * kUnit;
        for (i64 i = 0; i < b.rows; ++i) {
            alignas(64) float natural[kBackUnits * kUnit];
            for (i64 u = 0; u < count; ++u) O::natural(c + i * c_stride + u * kUnit, natural + u * kUnit);
            O::store_row(natural, nullptr, least(count * kUnit, b.w.cols - k), at(b.dx, i * b.w.cols + k, b.type), b.type);
        }
    }
};

template <class O>
void backward(const Weight& w, const void* dy, i64 m, i64 dy_stride, Float type, void* dx, int threads) {
    i64 steps = ceil_div(w.rows, O::kPer), units = ceil_div(w.cols, kUnit);
    threads = useful_threads(threads, m, w);
    for (i64 m0 = 0; m0 < m; m0 += kBlockRows) {
        i64 rows = least(kBlockRows, m - m0);
        void* converted = scratch(0, static_cast<std::size_t>(rows * steps * O::kPer) * sizeof(typename O::E));
        Backward<O> b{w,     at(dy, m0 * dy_stride, type), rows, dy_stride, type, at(dx, m0 * w.cols, type), static_cast<typename O::E*>(converted),
                      steps, units};
        run(threads, ceil_div(rows, kRowsATask), Backward<O>::convert, &b);
        run(threads, ceil_div(units, kBackUnits), Backward<O>::columns, &b);
    }
}

}  // namespace fourscore::FOURSCORE_ISA
