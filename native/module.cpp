// The Python face of the kernels. Tensors come as addresses: src/fourscore/nf4/kernels.py has checked their shapes, types and
// contiguity. The interpreter lock is released while a kernel runs.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "decoder_module.h"
#include "nf4.h"
#include "ops_module.h"

namespace nb = nanobind;
using namespace fourscore;
using Address = std::uintptr_t;
using i64 = std::int64_t;

namespace {

const Backend* backend = nullptr;

std::vector<std::string> available() {
    std::vector<std::string> names;
    for (const Backend* b : backends()) names.emplace_back(b->name);
    return names;
}

bool choose(const std::string& name) {
    for (const Backend* b : backends())
        if (name == b->name) {
            backend = b;
            choose_operations(b->name);
            choose_decoder(*b);
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

void nested(Address values, i64 n, Address table, i64 block, Address codes, Address absmax) {
    nb::gil_scoped_release unlocked;
    nested_quantize(at<const float>(values), n, at<const float>(table), block, at<std::uint8_t>(codes), at<float>(absmax));
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
    backend = backends().front();
    choose_operations(backend->name);
    choose_decoder(*backend);
    m.def("available", &available);
    m.def("backend", [] { return std::string(backend->name); });
    m.def("choose", &choose);
    m.def("quantize", &quantize);
    m.def("nested_quantize", &nested);
    nb::class_<PackedWeight>(m, "Weight").def(nb::init<Address, i64, i64, i64, Address, Address, Address, Address, float, i64>());
    m.def("dequantize", &dequantize);
    m.def("forward", &forward);
    m.def("backward", &backward);
    define_operations(m);
    define_decoder(m);
}
