// Weights and tables come as addresses: src/fourscore/engine has checked their shapes, types and contiguity, and keeps them
// alive. The interpreter lock is released during a forward pass.
#include "decoder_module.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <tuple>

#include "decoder.h"

namespace nb = nanobind;

namespace fourscore {
namespace {

using Address = std::uintptr_t;
using i64 = std::int64_t;

const Backend* backend = &kScalar;
const DecoderKernels* kernels = &kScalarDecoder;

template <class T>
T* at(Address a) {
    return reinterpret_cast<T*>(a);
}

// weight, epsilon, round_first
using NormTuple = std::tuple<Address, float, bool>;
Norm norm_of(const NormTuple& n) { return {at<const float>(std::get<0>(n)), std::get<1>(n), std::get<2>(n)}; }

// As nf4.kernels gives them: packed, rows, cols, block, scales, codes, nested code, nested absmax, offset, nested block.
using WeightTuple = std::tuple<Address, i64, i64, i64, Address, Address, Address, Address, float, i64>;

std::shared_ptr<Linear> packed_linear(const WeightTuple& t, Address bias) {
    auto [packed, rows, cols, block, scales, codes, code, absmax, offset, nested_block] = t;
    Weight w{at<const std::uint8_t>(packed), rows,   cols,        block, at<const float>(scales), at<const std::uint8_t>(codes), at<const float>(code),
             at<const float>(absmax),        offset, nested_block};
    return std::make_shared<Linear>(w, at<const float>(bias));
}

std::shared_ptr<Linear> dense_linear(Address weight, int type, i64 rows, i64 cols, Address bias) {
    return std::make_shared<Linear>(at<const void>(weight), static_cast<Float>(type), rows, cols, at<const float>(bias));
}

void make_decoder(Decoder* self, const std::tuple<i64, i64, i64, i64, i64>& sizes, float scale, float attention_cap, int activation, int type,
                  Address embedding, float embedding_scale, const NormTuple& last, const std::shared_ptr<Linear>& head, float logit_cap) {
    auto [hidden, heads, groups, width, inner] = sizes;
    Shape shape{hidden, heads, groups, width, inner, scale, attention_cap, static_cast<Activation>(activation), static_cast<Float>(type)};
    new (self) Decoder(*backend, *kernels, shape, at<const void>(embedding), embedding_scale, norm_of(last), head, logit_cap);
}

// norms: before and after attention, before and after the MLP, of queries, of keys.
void add_layer(Decoder& self, const std::vector<NormTuple>& norms, const std::vector<std::shared_ptr<Linear>>& qkv,
               const std::shared_ptr<Linear>& out, const std::vector<std::shared_ptr<Linear>>& gate_up, const std::shared_ptr<Linear>& down,
               i64 rope, i64 window) {
    self.add_layer({norm_of(norms.at(0)), norm_of(norms.at(1)), norm_of(norms.at(2)), norm_of(norms.at(3)), norm_of(norms.at(4)),
                    norm_of(norms.at(5)), qkv, gate_up, out, down, rope, window});
}

// Parts: a, b, rank, scale of each linear layer.
void set_adapter(Decoder& self, i64 number, const std::vector<std::tuple<Address, Address, i64, float>>& parts) {
    std::vector<LowRank> list;
    for (const auto& [a, b, rank, scale] : parts) list.push_back({at<const void>(a), at<const void>(b), rank, scale});
    self.set_adapter(number, std::move(list));
}

// spans: int64 [count, 5], as Span.
void forward(Decoder& self, Address ids, i64 rows, Address spans, i64 span_count, Address keep, i64 kept, Address logits, int threads) {
    static_assert(sizeof(Span) == 5 * sizeof(i64) && sizeof(void*) == 8);
    nb::gil_scoped_release unlocked;
    self.forward(at<const i64>(ids), rows, at<const Span>(spans), span_count, at<const i64>(keep), kept, at<float>(logits), threads);
}

}  // namespace

void choose_decoder(const Backend& b) {
    backend = &b;
    kernels = &kScalarDecoder;  // also beside backends that have no kernels of their own (NEON)
#ifdef FOURSCORE_X86
    for (const DecoderKernels* k : {&kAvx2Decoder, &kAvx512Decoder, &kAvx512Bf16Decoder})
        if (std::strcmp(k->name, b.name) == 0) kernels = k;
#endif
}

void define_decoder(nb::module_& m) {
    nb::class_<Linear>(m, "Linear").def_ro("index", &Linear::index);
    m.def("packed_linear", &packed_linear);
    m.def("dense_linear", &dense_linear);
    nb::class_<Decoder>(m, "Decoder")
        .def("__init__", &make_decoder)
        .def("add_layer", &add_layer)
        .def("set_rope", [](Decoder& d, i64 number, Address cos, Address sin, i64 rotary) {
            d.set_rope(number, {at<const float>(cos), at<const float>(sin), rotary});
        })
        .def("set_adapter", &set_adapter)
        .def("page_bytes", &Decoder::page_bytes)
        .def("forward", &forward);
    m.attr("PAGE") = kPage;
}

}  // namespace fourscore
