// Tensors come as addresses: src/fourscore/train/ops.py has checked their shapes, types and strides. The interpreter lock is
// released while an operation runs.
#include "ops_module.h"

#include <cstring>

#include "ops.h"

namespace nb = nanobind;

namespace fourscore {
namespace {

using Address = std::uintptr_t;
using i64 = std::int64_t;

const Operations* operations = &kScalarOperations;

void* at(Address a) { return reinterpret_cast<void*>(a); }

void swiglu(Address gate, Address up, int type, i64 n, Address y, int threads) {
    nb::gil_scoped_release unlocked;
    operations->swiglu(at(gate), at(up), static_cast<Float>(type), n, at(y), threads);
}

void swiglu_backward(Address dy, Address gate, Address up, int type, i64 n, Address dgate, Address dup, int threads) {
    nb::gil_scoped_release unlocked;
    operations->swiglu_backward(at(dy), at(gate), at(up), static_cast<Float>(type), n, at(dgate), at(dup), threads);
}

}  // namespace

void choose_operations(const char* name) {
    operations = &kScalarOperations;
#ifdef FOURSCORE_X86
    for (const Operations* o : {&kAvx2Operations, &kAvx512Operations, &kAvx512Bf16Operations})
        if (std::strcmp(o->name, name) == 0) operations = o;
#endif
}

void define_operations(nb::module_& m) {
    m.def("swiglu", &swiglu);
    m.def("swiglu_backward", &swiglu_backward);
}

}  // namespace fourscore
