// Quantise and dequantise, over blocks and threads. What differs between instruction sets comes from the backend as
// Codec::absmax (bits of the largest magnitude of a block), Codec::codes (a full block) and Codec::expand (whole bytes that
// share one scale) and Codec::scales.
#pragma once

#include <atomic>

#include "portable.h"

namespace fourscore::FOURSCORE_ISA {

// The plain versions: loops a compiler vectorises well.
struct PlainCodec {
    static u32 absmax(const void* source, Float type, i64 start, i64 count) {
        u32 largest = 0;
        if (type == Float::f32) {
            const float* p = static_cast<const float*>(source) + start;
            for (i64 i = 0; i < count; ++i) {
                u32 m = bits_of(p[i]) & 0x7fffffffu;
                largest = m > largest ? m : largest;
            }
        } else {
            const u16* p = static_cast<const u16*>(source) + start;
            u16 half = 0;
            for (i64 i = 0; i < count; ++i) {
                u16 m = p[i] & 0x7fffu;
                half = m > half ? m : half;
            }
            largest = bits_of(type == Float::bf16 ? from_bf16(half) : from_f16(half));
        }
        return largest;
    }

    static void codes(const void* source, Float type, i64 start, i64 count, float inverse, u8* packed) {
        float v[32];
        u32 code[32];
        for (i64 i = 0; i < count; i += 32) {
            for (int j = 0; j < 32; ++j) v[j] = load_one(source, start + i + j, type) * inverse;
            for (int j = 0; j < 32; ++j) code[j] = 0;
            for (float m : kMidpoint)
                for (int j = 0; j < 32; ++j) code[j] += v[j] > m;
            for (int j = 0; j < 16; ++j) packed[(start + i) / 2 + j] = static_cast<u8>(code[2 * j] << 4 | code[2 * j + 1]);
        }
    }

    static void expand(const u8* packed, i64 bytes, float scale, void* out, Float type) {
        if (type == Float::f32) {
            float table[16];
            for (int c = 0; c < 16; ++c) table[c] = kValues[c] * scale;
            float* o = static_cast<float*>(out);
            for (i64 i = 0; i < bytes; ++i) o[2 * i] = table[packed[i] >> 4], o[2 * i + 1] = table[packed[i] & 15];
        } else {
            u16 table[16];
            for (int c = 0; c < 16; ++c) store_one(table, c, type, kValues[c] * scale);
            u16* o = static_cast<u16*>(out);
            for (i64 i = 0; i < bytes; ++i) o[2 * i] = table[packed[i] >> 4], o[2 * i + 1] = table[packed[i] & 15];
        }
    }

    static void scales(const Weight& w, i64 first, i64 count, float* out) {
        for (i64 i = 0; i < count; ++i) out[i] = scale_of(w, first + i);
    }
};

constexpr i64 kSlice = 1 << 16;  // values a thread takes at a time

template <class Codec>
i64 quantize(const void* source, Float type, i64 n, i64 block, u8* packed, float* absmax, int threads) {
    struct Job {
        const void* source;
        Float type;
        i64 n, block, per_task;
        u8* packed;
        float* absmax;
        std::atomic<i64> bad;
    } job{source, type, n, block, most(1, kSlice / block), packed, absmax, {INT64_MAX}};
    i64 blocks = ceil_div(n, block);
    run(
        threads, ceil_div(blocks, job.per_task),
        [](void* p, i64 task) {
            Job& j = *static_cast<Job*>(p);
            i64 end = least(ceil_div(j.n, j.block), (task + 1) * j.per_task);
            for (i64 b = task * j.per_task; b < end; ++b) {
                i64 start = b * j.block, bad = -1;
                if (start + j.block > j.n) {
                    bad = quantize_tail(j.source, j.type, start, j.n - start, j.packed, j.absmax + b);
                } else if (u32 largest = Codec::absmax(j.source, j.type, start, j.block); largest >= 0x7f800000u) {
                    bad = first_not_finite(j.source, j.type, start, j.block);
                } else {
                    float scale = float_of(largest);
                    j.absmax[b] = scale;
                    Codec::codes(j.source, j.type, start, j.block, 1.0f / (scale < kFloor ? kFloor : scale), j.packed);
                }
                if (bad >= 0) {
                    i64 seen = j.bad.load();
                    while (bad < seen && !j.bad.compare_exchange_weak(seen, bad)) {
                    }
                    return;
                }
            }
        },
        &job);
    return job.bad == INT64_MAX ? -1 : job.bad.load();
}

template <class Codec>
void dequantize(const Weight& w, void* out, Float type, int threads) {
    struct Job {
        const Weight& w;
        void* out;
        Float type;
        i64 n, per_task;
    } job{w, out, type, w.rows * w.cols, most(1, kSlice / w.block)};
    run(
        threads, ceil_div(ceil_div(job.n, w.block), job.per_task),
        [](void* p, i64 task) {
            Job& j = *static_cast<Job*>(p);
            i64 block = j.w.block, end = least(ceil_div(j.n, block), (task + 1) * j.per_task);
            i64 first = task * j.per_task;
            float scales[kSlice / 32];  // 32: the smallest block
            Codec::scales(j.w, first, end - first, scales);
            for (i64 b = first; b < end; ++b) {
                i64 start = b * block, count = least(block, j.n - start);
                Codec::expand(j.w.packed + start / 2, count / 2, scales[b - first], at(j.out, start, j.type), j.type);
                if (count % 2) store_one(j.out, j.n - 1, j.type, value_at(j.w, j.n - 1));
            }
        },
        &job);
}

}  // namespace fourscore::FOURSCORE_ISA
