// The Python face of the kernels. Tensors come as addresses: src/fourscore/nf4/kernels.py has checked their shapes, types and
// contiguity. The interpreter lock is released while a kernel runs.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "nf4.h"
#include "ops_module.h"

namespace nb = nanobind;
using namespace fourscore;
using Address = std::uintptr_t;
using i64 = std::int64_t;

namespace {

const Backend* backend = nullptr;

std::vector<const Backend*> all() {
    std::vector<const Backend*> found;
#ifdef FOURSCORE_X86
    __builtin_cpu_init();
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl");
    if (wide && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi")) found.push_back(&kAvx512Bf16);
    if (wide) found.push_back(&kAvx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) found.push_back(&kAvx2);
#endif
    found.push_back(&kScalar);
    return found;
}

std::vector<std::string> available() {
    std::vector<std::string> names;
    for (const Backend* b : all()) names.emplace_back(b->name);
    return names;
}

bool choose(const std::string& name) {
    for (const Backend* b : all())
        if (name == b->name) {
            backend = b;
            choose_operations(b->name);
            return true;
        }
    return false;
}

template <class T>
T* at(Address a) {
    return reinterpret_cast<T*>(a);
}

i64 quantize(Address source, int type, i64 n, i64 block, Address packed, Address absmax, int threads) {
    nb::gil_scoped_release unlocked;
    return backend->quantize(at<const void>(source), static_cast<Float>(type), n, block, at<std::uint8_t>(packed), at<float>(absmax), threads);
}

// 8-bit codes of a sorted table of 256 values, as bitsandbytes finds them: a value in [-1, 1] is rounded to one of 65,536
// steps, and each step has the code of the nearest value.
void nested_quantize(Address values, i64 n, Address table, i64 block, Address codes, Address absmax) {
    nb::gil_scoped_release unlocked;
    const float *v = at<const float>(values), *t = at<const float>(table);
    static std::mutex one_at_a_time;
    static float steps_of[256];
    static std::vector<std::uint8_t> steps;
    std::lock_guard lock(one_at_a_time);
    if (steps.empty() || std::memcmp(steps_of, t, sizeof steps_of) != 0) {
        std::memcpy(steps_of, t, sizeof steps_of);
        steps.resize(65536);
        int code = 0;
        for (int i = 0; i < 65536; ++i) {
            float step = -1.0f + (2.0f * static_cast<float>(i)) / 65535.0f;
            while (code < 255 && 0.5f * (t[code] + t[code + 1]) < step) ++code;
            steps[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(code);
        }
    }
    std::uint8_t* out = at<std::uint8_t>(codes);
    float* scales = at<float>(absmax);
    for (i64 b = 0; b * block < n; ++b) {
        i64 end = n < (b + 1) * block ? n : (b + 1) * block;
        float largest = 0;
        for (i64 i = b * block; i < end; ++i) largest = std::fabs(v[i]) > largest ? std::fabs(v[i]) : largest;
        scales[b] = largest;
        if (largest == 0) {
            std::memset(out + b * block, 0, static_cast<std::size_t>(end - b * block));
            continue;
        }
        float inverse = 1.0f / largest;
        for (i64 i = b * block; i < end; ++i) {
            float s = v[i] * inverse;
            s = s < -1 ? -1 : s > 1 ? 1 : s;
            // The original fuses this product and sum; in f64 both are exact, so it is rounded once here too.
            float step = static_cast<float>(static_cast<double>((s + 1.0f) * 0.5f) * 65535.0 + 0.5);
            out[i] = steps[static_cast<std::uint16_t>(step)];
        }
    }
}

struct PackedWeight {
    Weight w;
    PackedWeight(Address packed, i64 rows, i64 cols, i64 block, Address scales, Address codes, Address nested_code,
                 Address nested_absmax, float nested_offset, i64 nested_block)
        : w{at<const std::uint8_t>(packed), rows,  cols, block, at<const float>(scales), at<const std::uint8_t>(codes),
            at<const float>(nested_code),   at<const float>(nested_absmax), nested_offset, nested_block} {}
};

void dequantize(const PackedWeight& p, Address out, int type, int threads) {
    nb::gil_scoped_release unlocked;
    backend->dequantize(p.w, at<void>(out), static_cast<Float>(type), threads);
}

void forward(const PackedWeight& p, Address x, i64 m, i64 x_stride, int type, Address bias, Address y, int threads) {
    nb::gil_scoped_release unlocked;
    backend->forward(p.w, at<const void>(x), m, x_stride, static_cast<Float>(type), at<const float>(bias), at<void>(y), threads);
}

void backward(const PackedWeight& p, Address dy, i64 m, i64 dy_stride, int type, Address dx, int threads) {
    nb::gil_scoped_release unlocked;
    backend->backward(p.w, at<const void>(dy), m, dy_stride, static_cast<Float>(type), at<void>(dx), threads);
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "NF4 kernels; see fourscore.nf4.kernels, which checks what goes in.";
    backend = all().front();
    choose_operations(backend->name);
    m.def("available", &available);
    m.def("backend", [] { return std::string(backend->name); });
    m.def("choose", &choose);
    m.def("quantize", &quantize);
    m.def("nested_quantize", &nested_quantize);
    nb::class_<PackedWeight>(m, "Weight").def(nb::init<Address, i64, i64, i64, Address, Address, Address, Address, float, i64>());
    m.def("dequantize", &dequantize);
    m.def("forward", &forward);
    m.def("backward", &backward);
    define_operations(m);
}
