// Tensors come as addresses: src/fourscore/train/ops.py has checked their shapes, types and strides. The interpreter lock is
// released while an operation runs.
#include "ops_module.h"

#include <nanobind/stl/tuple.h>

#include <cstring>
#include <tuple>

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

void norm(Address x, Address weight, int type, i64 rows, i64 n, float epsilon, Address y, Address scale, int threads) {
    nb::gil_scoped_release unlocked;
    operations->norm(at(x), at(weight), static_cast<Float>(type), rows, n, epsilon, at(y), static_cast<float*>(at(scale)), threads);
}

void norm_backward(Address dy, Address x, Address weight, Address scale, int type, i64 rows, i64 n, Address dx, int threads) {
    nb::gil_scoped_release unlocked;
    const float* s = static_cast<const float*>(at(scale));
    operations->norm_backward(at(dy), at(x), at(weight), s, static_cast<Float>(type), rows, n, at(dx), threads);
}

// A tensor [b, h, t, d] as (address, stride of b, of h, of t).
using Tensor = std::tuple<Address, i64, i64, i64>;
Heads heads_of(const Tensor& t) { return {at(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)}; }

void rope(const Tensor& x, Address cos, Address sin, i64 cos_batch, int type, i64 batch, i64 heads, i64 places, i64 d, bool back,
          const Tensor& y, int threads) {
    nb::gil_scoped_release unlocked;
    operations->rope(heads_of(x), at(cos), at(sin), cos_batch, static_cast<Float>(type), batch, heads, places, d, back, heads_of(y), threads);
}

void nats(Address logits, int type, i64 rows, i64 n, Address targets, Address losses, bool gradient, int threads) {
    nb::gil_scoped_release unlocked;
    operations->nats(at(logits), static_cast<Float>(type), rows, n, static_cast<const i64*>(at(targets)), static_cast<float*>(at(losses)),
                     gradient, threads);
}

// A matrix as (address, stride of rows, stride of columns, type).
using Matrix = std::tuple<Address, i64, i64, int>;
void product(i64 m, i64 n, i64 k, const Matrix& a, const Matrix& b, const Matrix& y, float scale, Address bias, bool add, int threads) {
    nb::gil_scoped_release unlocked;
    auto [a_at, a_row, a_step, a_type] = a;
    auto [b_at, b_row, b_step, b_type] = b;
    auto [y_at, y_row, y_column, y_type] = y;
    operations->product({m, n, k, at(a_at), a_row, a_step, static_cast<Float>(a_type), at(b_at), b_row, b_step, static_cast<Float>(b_type), at(y_at),
                         y_row, y_column, static_cast<Float>(y_type), scale, static_cast<const float*>(at(bias)), add},
                        threads);
}

// batch, heads, groups, queries, keys, width
using Shape = std::tuple<i64, i64, i64, i64, i64, i64>;
Attention attention_of(const Shape& s, float scale, int type) {
    auto [batch, heads, groups, queries, keys, width] = s;
    return {batch, heads, groups, queries, keys, width, scale, static_cast<Float>(type)};
}

void attention(const Shape& shape, float scale, int type, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
               Address normaliser, int threads) {
    nb::gil_scoped_release unlocked;
    operations->attention(attention_of(shape, scale, type), heads_of(q), heads_of(k), heads_of(v), heads_of(out),
                          static_cast<float*>(at(normaliser)), threads);
}

void attention_backward(const Shape& shape, float scale, int type, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                        Address normaliser, const Tensor& dout, const Tensor& dq, const Tensor& dk, const Tensor& dv, int threads) {
    nb::gil_scoped_release unlocked;
    operations->attention_backward(attention_of(shape, scale, type), heads_of(q), heads_of(k), heads_of(v), heads_of(out),
                                   static_cast<const float*>(at(normaliser)), heads_of(dout), heads_of(dq), heads_of(dk), heads_of(dv), threads);
}

}  // namespace

void choose_operations(const char* name) {
    operations = &kScalarOperations;  // also beside backends that have no operations of their own (NEON)
#ifdef FOURSCORE_X86
    for (const Operations* o : {&kAvx2Operations, &kAvx512Operations, &kAvx512Bf16Operations})
        if (std::strcmp(o->name, name) == 0) operations = o;
#endif
}

void define_operations(nb::module_& m) {
    m.def("product", &product);
    m.def("swiglu", &swiglu);
    m.def("swiglu_backward", &swiglu_backward);
    m.def("norm", &norm);
    m.def("norm_backward", &norm_backward);
    m.def("rope", &rope);
    m.def("nats", &nats);
    m.def("attention", &attention);
    m.def("attention_backward", &attention_backward);
}

}  // namespace fourscore
