// y = x W^T + bias and dx = dy W, W packed. Templates over a backend's Ops:
//
//   E, Vec, Acc        element, a vector of kWidth elements, a vector of kLanes f32 sums
//   kRows              rows of x a register tile holds (beside 4 outputs)
//   kChunkUnits        units of k that one f32 sum covers before it is added to the result (one chunk of 6 + 4 rows fits L1)
//   kStep              rows of W in one step of backward's product (2: bf16 pairs)
//   load zero fma sum4 dot product: fma(acc, x, w) over k; sum4 adds up 4 sums' lanes in a fixed order
//   table decode       a scale's 16 values; 32 packed bytes -> the Vecs of a unit
//   permute unpermute  natural order of a unit <-> the order decode gives (even k first, then odd k, group by group)
//   interleave         two rows of a unit -> kStep-row vectors; spread(dy, s): element(s) of step s in every lane
//
// Order of summation, which makes rows batch-invariant: an output's sum runs over k in chunks whose size depends on K alone;
// in a chunk over vectors in turn, lane by lane; then lanes in sum4's tree; then chunks in turn; then the bias. Nothing in
// this depends on the number of rows, of threads, or on which path (packed nibbles or a decoded tile) was taken.
#pragma once

#include "portable.h"

namespace fourscore::FOURSCORE_ISA {

constexpr i64 kTileOutputs = 48;  // outputs decoded at a time (a multiple of 4): x is read from memory once for each tile
constexpr i64 kBlockRows = 512;   // rows of x laid out at a time
constexpr i64 kBackUnits = 2;     // units of k in a tile of backward: a whole cache line of packed codes
constexpr i64 kBackSteps = 512;   // steps (kStep rows of W) in a tile of backward

// Can units be decoded straight from memory? Otherwise they go through plain_unit.
static inline bool aligned_units(const Weight& w) { return w.cols % kUnit == 0 && w.block % kUnit == 0; }

static inline void unit_scales(const Weight& w, i64 row, i64 unit, i64 count, float* out) {
    i64 flat = row * w.cols + unit * kUnit;
    i64 first = flat / kUnit, per_block = w.block / kUnit;
    if (w.scales) {
        for (i64 i = 0; i < count; ++i) out[i] = w.scales[(first + i) / per_block];
        return;
    }
    for (i64 i = 0; i < count; ++i) {
        i64 b = per_block == 1 ? first + i : (first + i) / per_block;
        out[i] = w.nested_code[w.codes[b]] * w.nested_absmax[w.nested_block == 256 ? b >> 8 : b / w.nested_block] + w.nested_offset;
    }
}

// Units [unit, unit + count) of row `row`, in the backend's order. Rows beyond the weight are zero.
template <class O>
void decode_units(const Weight& w, i64 row, i64 unit, i64 count, Float round, typename O::E* out) {
    if (row >= w.rows) {
        std::memset(out, 0, static_cast<std::size_t>(count * kUnit) * sizeof(typename O::E));
    } else if (aligned_units(w)) {
        float scales[64];
        for (i64 done = 0; done < count; done += 64) {
            i64 now = least(64, count - done);
            unit_scales(w, row, unit + done, now, scales);
            const u8* bytes = w.packed + (row * w.cols + (unit + done) * kUnit) / 2;
            for (i64 u = 0; u < now; ++u) {
                typename O::Vec v[kUnit / O::kWidth];
                O::decode(bytes + u * 32, O::table(scales[u], round), v);
                for (int h = 0; h < kUnit / O::kWidth; ++h) O::store(out + (done + u) * kUnit + h * O::kWidth, v[h]);
            }
        }
    } else {
        for (i64 u = 0; u < count; ++u) {
            float natural[kUnit];
            plain_unit(w, row, (unit + u) * kUnit, round, natural);
            O::permute(natural, out + u * kUnit);
        }
    }
}

// Rows of x in the backend's element type and order, padded with zeros to whole units.
template <class O>
void lay_out_row(const void* x, Float type, i64 cols, typename O::E* out) {
    i64 whole = cols / kUnit;
    for (i64 u = 0; u < whole; ++u) O::permute_from(at(x, u * kUnit, type), type, out + u * kUnit);
    if (cols % kUnit) {
        float natural[kUnit] = {};
        for (i64 i = whole * kUnit; i < cols; ++i) natural[i - whole * kUnit] = load_one(x, i, type);
        O::permute(natural, out + whole * kUnit);
    }
}

// c[i][0..4) (+)= x rows times 4 rows of a decoded tile.
template <class O, int R>
inline void dot_tile(const typename O::E* x, i64 x_stride, const typename O::E* w, i64 w_stride, i64 vectors, float* c,
                     i64 c_stride, bool add) {
    typename O::Acc acc[R][4];
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < 4; ++j) acc[i][j] = O::zero();
    for (i64 v = 0; v < vectors; ++v) {
        typename O::Vec wv[4];
        for (int j = 0; j < 4; ++j) wv[j] = O::load(w + j * w_stride + v * O::kWidth);
        for (int i = 0; i < R; ++i) {
            typename O::Vec xv = O::load(x + i * x_stride + v * O::kWidth);
            for (int j = 0; j < 4; ++j) acc[i][j] = O::fma(acc[i][j], xv, wv[j]);
        }
    }
    for (int i = 0; i < R; ++i) O::sum4(acc[i], c + i * c_stride, add);
}

// The same product for rows of W that are decoded on the way: c[i][0..4) for outputs n .. n + 3 (at most `rows` - 1).
template <class O, int R>
inline void dot_packed(const Weight& w, Float round, i64 n, const typename O::E* x, i64 x_stride, i64 units, i64 chunk, float* c) {
    for (i64 u0 = 0; u0 < units; u0 += chunk) {
        i64 count = least(chunk, units - u0);
        const u8* bytes[4];
        float scales[4][O::kChunkUnits];
        for (int j = 0; j < 4; ++j) {
            i64 row = least(n + j, w.rows - 1);
            bytes[j] = w.packed + (row * w.cols + u0 * kUnit) / 2;
            unit_scales(w, row, u0, count, scales[j]);
        }
        typename O::Acc acc[R][4];
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < 4; ++j) acc[i][j] = O::zero();
        const typename O::E* xu = x + u0 * kUnit;
        for (i64 u = 0; u < count; ++u, xu += kUnit)
            for (int j = 0; j < 4; ++j) {
                typename O::Vec v[kUnit / O::kWidth];
                O::decode(bytes[j] + u * 32, O::table(scales[j][u], round), v);
                for (int h = 0; h < kUnit / O::kWidth; ++h)
                    for (int i = 0; i < R; ++i) acc[i][j] = O::fma(acc[i][j], O::load(xu + i * x_stride + h * O::kWidth), v[h]);
            }
        for (int i = 0; i < R; ++i) O::sum4(acc[i], c + i * 4, u0 > 0);
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

template <class O>
void forward(const Weight& w, const void* x, i64 m, i64 x_stride, Float type, const float* bias, void* y, int threads) {
    using E = typename O::E;
    struct Job {
        const Weight& w;
        const void* x;
        i64 rows, x_stride;
        Float type;
        const float* bias;
        void* y;
        E* xs;
        i64 units, chunk, tile, tiles;
    };
    i64 units = ceil_div(w.cols, kUnit);
    i64 chunk = ceil_div(units, ceil_div(units, O::kChunkUnits));
    threads = useful_threads(threads, m, w);
    // A multiple of 4 outputs a tile, and some tiles for each thread to share.
    i64 tile = kTileOutputs;
    if (w.rows < kTileOutputs * 2 * threads) tile = most(4, ceil_div(ceil_div(w.rows, 2 * threads), 4) * 4);
    for (i64 m0 = 0; m0 < m; m0 += kBlockRows) {
        i64 rows = least(kBlockRows, m - m0);
        Job job{w,    at(x, m0 * x_stride, type), rows,  x_stride, type, bias, at(y, m0 * w.rows, type), nullptr,
                units, chunk, tile,  ceil_div(w.rows, tile)};
        job.xs = static_cast<E*>(scratch(0, static_cast<std::size_t>(rows * units * kUnit) * sizeof(E)));
        constexpr i64 kRowsATask = 16;
        run(
            threads, ceil_div(rows, kRowsATask),
            [](void* p, i64 task) {
                Job& j = *static_cast<Job*>(p);
                for (i64 i = task * kRowsATask; i < least(j.rows, (task + 1) * kRowsATask); ++i)
                    lay_out_row<O>(at(j.x, i * j.x_stride, j.type), j.type, j.w.cols, j.xs + i * j.units * kUnit);
            },
            &job);
        if (rows <= O::kRows && aligned_units(w)) {
            run(
                threads, job.tiles,
                [](void* p, i64 task) {
                    Job& j = *static_cast<Job*>(p);
                    i64 end = least(j.w.rows, (task + 1) * j.tile);
                    for (i64 n = task * j.tile; n < end; n += 4) {
                        float c[O::kRows * 4];
                        with_rows<O::kRows>(j.rows, [&]<int R>() {
                            dot_packed<O, R>(j.w, j.type, n, j.xs, j.units * kUnit, j.units, j.chunk, c);
                        });
                        for (i64 i = 0; i < j.rows; ++i)
                            O::store_row(c + i * 4, j.bias ? j.bias + n : nullptr, least(4, end - n), at(j.y, i * j.w.rows + n, j.type), j.type);
                    }
                },
                &job);
            continue;
        }
        run(
            threads, job.tiles,
            [](void* p, i64 task) {
                Job& j = *static_cast<Job*>(p);
                i64 n0 = task * j.tile, outputs = least(j.tile, j.w.rows - n0), padded = ceil_div(outputs, 4) * 4;
                E* tile = static_cast<E*>(scratch(1, static_cast<std::size_t>(padded * j.chunk * kUnit) * sizeof(E)));
                float* c = static_cast<float*>(scratch(2, static_cast<std::size_t>(j.rows * padded) * sizeof(float)));
                i64 x_stride = j.units * kUnit;
                for (i64 u0 = 0; u0 < j.units; u0 += j.chunk) {
                    i64 count = least(j.chunk, j.units - u0), stride = count * kUnit;
                    for (i64 n = 0; n < padded; ++n) decode_units<O>(j.w, n0 + n, u0, count, j.type, tile + n * stride);
                    for (i64 i = 0; i < j.rows; i += O::kRows)
                        with_rows<O::kRows>(least(O::kRows, j.rows - i), [&]<int R>() {
                            for (i64 n = 0; n < padded; n += 4)
                                dot_tile<O, R>(j.xs + i * x_stride + u0 * kUnit, x_stride, tile + n * stride, stride,
                                               stride / O::kWidth, c + i * padded + n, padded, u0 > 0);
                        });
                }
                for (i64 i = 0; i < j.rows; ++i)
                    O::store_row(c + i * padded, j.bias ? j.bias + n0 : nullptr, outputs, at(j.y, i * j.w.rows + n0, j.type), j.type);
            },
            &job);
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
void backward(const Weight& w, const void* dy, i64 m, i64 dy_stride, Float type, void* dx, int threads) {
    using E = typename O::E;
    // Vectors of kStep rows of a unit, and groups of 4 of them.
    constexpr i64 kVectors = kUnit * O::kStep / O::kWidth, kQuads = kVectors / 4, kSpan = kUnit / kQuads;
    struct Job {
        const Weight& w;
        const void* dy;
        i64 rows, dy_stride;
        Float type;
        void* dx;
        E* ds;
        i64 steps, units, chunk;
    };
    i64 steps = ceil_div(w.rows, O::kStep), units = ceil_div(w.cols, kUnit);
    threads = useful_threads(threads, m, w);
    for (i64 m0 = 0; m0 < m; m0 += kBlockRows) {
        i64 rows = least(kBlockRows, m - m0);
        Job job{w, at(dy, m0 * dy_stride, type), rows, dy_stride, type, at(dx, m0 * w.cols, type), nullptr, steps, units, kBackSteps};
        job.ds = static_cast<E*>(scratch(0, static_cast<std::size_t>(rows * steps * O::kStep) * sizeof(E)));
        constexpr i64 kRowsATask = 16;
        run(
            threads, ceil_div(rows, kRowsATask),
            [](void* p, i64 task) {
                Job& j = *static_cast<Job*>(p);
                for (i64 i = task * kRowsATask; i < least(j.rows, (task + 1) * kRowsATask); ++i)
                    O::convert(at(j.dy, i * j.dy_stride, j.type), j.type, j.w.rows, j.steps * O::kStep, j.ds + i * j.steps * O::kStep);
            },
            &job);
        run(
            threads, ceil_div(units, kBackUnits),
            [](void* p, i64 task) {
                Job& j = *static_cast<Job*>(p);
                i64 u0 = task * kBackUnits, count = least(kBackUnits, j.units - u0);
                E* tile = static_cast<E*>(scratch(1, static_cast<std::size_t>(count * kUnit * j.chunk * O::kStep) * sizeof(E)));
                float* c = static_cast<float*>(scratch(2, static_cast<std::size_t>(j.rows * count * kUnit) * sizeof(float)));
                i64 c_stride = count * kUnit, d_stride = j.steps * O::kStep;
                for (i64 s0 = 0; s0 < j.steps; s0 += j.chunk) {
                    i64 now = least(j.chunk, j.steps - s0);
                    // tile: [unit][quad][step][4 vectors]
                    for (i64 s = 0; s < now; ++s) {
                        alignas(64) E rows[O::kStep][kBackUnits * kUnit];
                        for (int r = 0; r < O::kStep; ++r)
                            decode_units<O>(j.w, (s0 + s) * O::kStep + r, u0, count, j.type, rows[r]);
                        for (i64 u = 0; u < count; ++u) {
                            typename O::Vec v[kVectors];
                            O::interleave(rows[0] + u * kUnit, rows[O::kStep - 1] + u * kUnit, v);
                            for (i64 q = 0; q < kQuads; ++q)
                                for (int h = 0; h < 4; ++h)
                                    O::store(tile + (((u * kQuads + q) * j.chunk + s) * 4 + h) * O::kWidth, v[q * 4 + h]);
                        }
                    }
                    for (i64 i = 0; i < j.rows; i += O::kRows)
                        with_rows<O::kRows>(least(O::kRows, j.rows - i), [&]<int R>() {
                            for (i64 q = 0; q < count * kQuads; ++q)
                                outer_tile<O, R>(j.ds + i * d_stride + s0 * O::kStep, d_stride, tile + q * j.chunk * 4 * O::kWidth, now,
                                                 c + i * c_stride + q * kSpan, c_stride, s0 > 0);
                        });
                }
                for (i64 i = 0; i < j.rows; ++i) {
                    alignas(64) float natural[kBackUnits * kUnit];
                    for (i64 u = 0; u < count; ++u) O::unpermute(c + i * c_stride + u * kUnit, natural + u * kUnit);
                    i64 k = u0 * kUnit;
                    O::store_row(natural, nullptr, least(count * kUnit, j.w.cols - k), at(j.dx, i * j.w.cols + k, j.type), j.type);
                }
            },
            &job);
    }
}

}  // namespace fourscore::FOURSCORE_ISA
