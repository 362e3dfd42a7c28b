// Every backend of this machine against the format and the products in double precision (reference.h). No Python.
//
//   quantise, dequantise   equal, bit for bit
//   products               one-hot rows give the weight itself, bit for bit; others lie within the rounding of n f32 sums in any
//                          order, n * 2^-24 of the terms' magnitude, and of the result, half a unit in its last place
//   rows                   the same bits alone, among few, among many, on 1 to 3 threads
//   memory                 every buffer has its exact size (check.h); outputs are NaN before
//
// --brief leaves the larger shapes out, for a machine that is emulated.
#include <algorithm>

#include "reference.h"

namespace fourscore::test {
namespace {

bool brief = false;

// The bf16 conversion of the processor takes subnormals for zero, and bitsandbytes' does where it has that instruction.
bool flushes(const Backend& b, Float type) { return type == Float::bf16 && std::strcmp(b.name, "avx512-bf16") == 0; }

std::vector<double> hard_values(const char* kind, i64 n, Float type, Random& random) {
    std::vector<double> v(static_cast<std::size_t>(n));
    const bool half = type == Float::f16;
    const std::string k = kind;
    for (double& x : v) {
        double normal = random.normal();
        x = k == "normal"     ? normal * 0.02
            : k == "constant" ? -0.3
            : k == "zero"     ? (random.bits() % 2 ? 0.0 : -0.0)
            : k == "tiny"     ? normal * (half ? 1e-7 : 1e-38)
            : k == "huge"     ? normal * (half ? 1.8e4 : 0.9e38)
                              : double{kMidpoint[random.bits() % 15]};
        x = rounded(x, type);
    }
    // Ties: with 1 in every block the others are compared as they are.
    if (k == "ties")
        for (i64 i = 0; i < n; i += 32) v[static_cast<std::size_t>(i)] = 1;
    return v;
}

void quantises(const Backend& b) {
    Random random(1);
    for (Float type : kTypes)
        for (i64 block : {32, 64, 4096})
            for (i64 n : {1, 2, 31, 64, 65, 4097, 140001})
                for (const char* kind : {"normal", "constant", "zero", "tiny", "huge", "ties"}) {
                    if (n > 5000 && std::strcmp(kind, "normal") != 0) continue;
                    std::vector<double> v = hard_values(kind, n, type, random);
                    i64 blocks = (n + block - 1) / block;
                    Buffer source(n * width(type)), want_packed((n + 1) / 2), want_absmax(4 * blocks);
                    for (i64 i = 0; i < n; ++i) put(source.data(), i, type, v[static_cast<std::size_t>(i)]);
                    quantize(v, block, want_packed.data(), want_absmax.as<float>());
                    for (int threads = 1; threads <= (n > 65536 ? 3 : 1); ++threads) {
                        Buffer packed((n + 1) / 2), absmax(4 * blocks);
                        i64 bad = b.quantize(source.data(), type, n, block, packed.data(), absmax.as<float>(), threads);
                        CHECK(bad == -1 && same(packed, want_packed) && same(absmax, want_absmax), "%s %s n=%lld block=%lld threads=%d", kind,
                              name_of(type), static_cast<long long>(n), static_cast<long long>(block), threads);
                    }
                }
}

void finds_what_is_not_finite(const Backend& b) {
    const i64 n = 200001, block = 64;
    const double bad_values[3] = {NAN, INFINITY, -INFINITY};
    Random random(2);
    for (Float type : kTypes) {
        Buffer source(n * width(type));
        for (i64 i = 0; i < n; ++i) put(source.data(), i, type, random.normal());
        for (i64 first : {i64{0}, i64{63}, i64{64}, i64{65535}, i64{65536}, i64{131100}, n - 2, n - 1})
            for (int threads = 1; threads <= 3; ++threads) {
                // The first is named, wherever others stand: in its block, in the next one, in the last.
                std::vector<i64> places = {first, std::min(first + 5, n - 1), std::min(first + 70, n - 1), n - 1};
                std::vector<double> kept;
                for (i64 p : places) kept.push_back(get(source.data(), p, type));
                for (std::size_t i = 0; i < places.size(); ++i) put(source.data(), places[i], type, bad_values[(i + static_cast<std::size_t>(threads)) % 3]);
                Buffer packed((n + 1) / 2), absmax(4 * ((n + block - 1) / block));
                i64 found = b.quantize(source.data(), type, n, block, packed.data(), absmax.as<float>(), threads);
                CHECK(found == first, "%s: %lld, not %lld", name_of(type), static_cast<long long>(found), static_cast<long long>(first));
                for (std::size_t i = places.size(); i-- > 0;) put(source.data(), places[i], type, kept[i]);
            }
    }
}

struct Case {
    i64 rows, cols, block;
    bool nested;
};
constexpr Case kCases[] = {{1, 1, 32, false},    {192, 576, 64, true},  {50, 1088, 64, true},  {49, 2176, 64, false}, {130, 192, 32, true},
                           {7, 33, 64, true},    {9, 97, 32, false},    {64, 128, 4096, true}, {31, 200, 128, true},  {3, 64, 64, false},
                           {300, 63, 256, false}, {8, 1024, 256, true}, {1100, 70, 64, true}};

// Random codes and scales in buffers of their own. `size`: about what a scale is.
struct Stored {
    Buffer packed, scales, codes, table, nested;
    Weight w;
    Stored(const Case& c, double size, std::uint64_t seed) {
        Random random(seed);
        i64 n = c.rows * c.cols, blocks = (n + c.block - 1) / c.block;
        packed = Buffer((n + 1) / 2);
        for (i64 i = 0; i < packed.bytes(); ++i) packed.data()[i] = static_cast<u8>(random.bits());
        w = {packed.data(), c.rows, c.cols, c.block, nullptr, nullptr, nullptr, nullptr, 0, 256};
        if (!c.nested) {
            scales = Buffer(4 * blocks);
            for (i64 i = 0; i < blocks; ++i) put(scales.data(), i, Float::f32, size * (0.5 + random.uniform()));
            w.scales = scales.as<float>();
            return;
        }
        codes = Buffer(blocks), table = Buffer(4 * 256), nested = Buffer(4 * ((blocks + 255) / 256));
        for (i64 i = 0; i < blocks; ++i) codes.data()[i] = static_cast<u8>(random.bits());
        for (i64 i = 0; i < 256; ++i) put(table.data(), i, Float::f32, (static_cast<double>(i) - 127) / 128);
        for (i64 i = 0; i < nested.bytes() / 4; ++i) put(nested.data(), i, Float::f32, size * (0.2 + 0.2 * random.uniform()));
        w.codes = codes.data(), w.nested_code = table.as<float>(), w.nested_absmax = nested.as<float>();
        w.nested_offset = static_cast<float>(size);
    }
};

void dequantises(const Backend& b) {
    for (const Case& c : kCases) {
        if (brief && c.rows * c.cols > 80000) continue;
        for (double size : {0.04, 1e-38, 6e-7, 3e4})
            for (Float type : kTypes) {
                Stored s(c, size, 3);
                i64 n = c.rows * c.cols;
                Buffer want(n * width(type));
                for (i64 i = 0; i < n; ++i) {
                    double v = value_at(s.w, i);
                    put(want.data(), i, type, flushes(b, type) && std::fabs(v) < 0x1p-126 ? std::copysign(0.0, v) : v);
                }
                for (int threads = 1; threads <= (n > 65536 ? 3 : 1); ++threads) {
                    Buffer out(n * width(type));
                    b.dequantize(s.w, out.data(), type, threads);
                    CHECK(same(out, want), "%s %lld x %lld block=%lld size=%g threads=%d", name_of(type), static_cast<long long>(c.rows),
                          static_cast<long long>(c.cols), static_cast<long long>(c.block), size, threads);
                }
            }
    }
}

// Rows of x or dy, `gap` unused elements (NaN) between two of them and none after the last.
struct Rows {
    i64 m, n, stride;
    Float type;
    Buffer data;
    Rows(i64 m_, i64 n_, i64 gap, Float type_) : m(m_), n(n_), stride(n_ + gap), type(type_), data(((m - 1) * stride + n) * width(type)) {}
    void set(i64 i, i64 k, double v) { put(data.data(), i * stride + k, type, v); }
    double at(i64 i, i64 k) const { return get(data.data(), i * stride + k, type); }
    const u8* row(i64 i) const { return data.data() + i * stride * width(type); }
    void fill(Random& random) {
        for (i64 i = 0; i < m; ++i)
            for (i64 k = 0; k < n; ++k) set(i, k, random.normal());
    }
};

enum class Way { forward, backward };

Buffer product(const Backend& b, Way way, const Weight& w, const u8* x, i64 m, i64 stride, Float type, const float* bias, int threads) {
    Buffer y(m * (way == Way::forward ? w.rows : w.cols) * width(type));
    if (way == Way::forward)
        b.forward(w, x, m, stride, type, bias, y.data(), threads);
    else
        b.backward(w, x, m, stride, type, y.data(), threads);
    return y;
}

void check_product(const Backend& b, Way way, const Weight& w, const Rows& x, const float* bias, const std::vector<double>& values) {
    const i64 outputs = way == Way::forward ? w.rows : w.cols;
    Buffer y = product(b, way, w, x.row(0), x.m, x.stride, x.type, bias, 1);
    double worst = 0;  // in units of what is allowed
    std::vector<double> row(static_cast<std::size_t>(x.n));
    for (i64 i = 0; i < x.m; ++i) {
        for (i64 k = 0; k < x.n; ++k) row[static_cast<std::size_t>(k)] = x.at(i, k);
        for (i64 o = 0; o < outputs; ++o) {
            double want = bias ? bias[o] : 0, magnitude = std::fabs(want);
            const double* v = values.data() + (way == Way::forward ? o * w.cols : o);
            const i64 step = way == Way::forward ? 1 : w.cols;
            for (i64 k = 0; k < x.n; ++k) {
                double term = row[static_cast<std::size_t>(k)] * v[k * step];
                want += term, magnitude += std::fabs(term);
            }
            double allowed = static_cast<double>(x.n + 2) * 0x1p-24 * magnitude + half_ulp(want, x.type) * 1.01;
            double off = std::fabs(get(y.data(), i * outputs + o, x.type) - want) / allowed;
            worst = off <= worst ? worst : off;  // a NaN comes through
        }
    }
    CHECK(worst <= 1, "%s %s %lld rows, %lld x %lld block=%lld: %g times the allowed rounding", way == Way::forward ? "forward" : "backward",
          name_of(x.type), static_cast<long long>(x.m), static_cast<long long>(w.rows), static_cast<long long>(w.cols),
          static_cast<long long>(w.block), worst);
}

// Row i is 1 at place i * 7 (modulo the width), so that its product is a row or column of the weight, exact in any order of sums.
void check_one_hot(const Backend& b, Way way, const Weight& w, i64 m, Float type, const std::vector<double>& values) {
    const i64 n = way == Way::forward ? w.cols : w.rows, outputs = way == Way::forward ? w.rows : w.cols;
    Rows x(m, n, 0, type);
    for (i64 i = 0; i < m; ++i)
        for (i64 k = 0; k < n; ++k) x.set(i, k, k == i * 7 % n);
    Buffer y = product(b, way, w, x.row(0), m, n, type, nullptr, 2);
    bool equal = true;
    for (i64 i = 0; i < m; ++i)
        for (i64 o = 0; o < outputs; ++o) {
            i64 k = i * 7 % n;
            equal &= get(y.data(), i * outputs + o, type) == values[static_cast<std::size_t>(way == Way::forward ? o * w.cols + k : k * w.cols + o)];
        }
    CHECK(equal, "%s %s %lld x %lld block=%lld, %lld one-hot rows", way == Way::forward ? "forward" : "backward", name_of(type),
          static_cast<long long>(w.rows), static_cast<long long>(w.cols), static_cast<long long>(w.block), static_cast<long long>(m));
}

void multiplies(const Backend& b) {
    Random random(4);
    for (const Case& c : kCases)
        for (Float type : kTypes) {
            Stored s(c, 0.04, 5);
            std::vector<double> values = dense(s.w, type);
            Buffer bias(4 * c.rows);
            for (i64 i = 0; i < c.rows; ++i) put(bias.data(), i, Float::f32, random.normal());
            for (i64 m : {1, 2, 3, 5, 7, 20}) {
                if (m * c.rows * c.cols > (brief ? 1 << 18 : 1 << 20)) continue;
                Rows x(m, c.cols, m % 2 * 3, type), dy(m, c.rows, m % 2 * 5, type);
                x.fill(random), dy.fill(random);
                check_product(b, Way::forward, s.w, x, m % 3 ? bias.as<float>() : nullptr, values);
                check_product(b, Way::backward, s.w, dy, nullptr, values);
            }
            for (i64 m : {3, 24}) {
                check_one_hot(b, Way::forward, s.w, m, type, values);
                check_one_hot(b, Way::backward, s.w, m, type, values);
            }
        }
}

// More rows than are laid out at a time (512), whose bits are then asked for in small parts and on more threads.
void rows_do_not_see_each_other(const Backend& b) {
    Random random(6);
    for (const Case& c : {Case{96, 576, 64, true}, Case{50, 1088, 64, false}, Case{64, 320, 32, true}, Case{9, 97, 64, true}}) {
        if (brief && c.rows > 64) continue;
        for (Float type : kTypes)
            for (Way way : {Way::forward, Way::backward}) {
                Stored s(c, 0.04, 7);
                const i64 m = 530, n = way == Way::forward ? c.cols : c.rows, row_bytes = (way == Way::forward ? c.rows : c.cols) * width(type);
                Rows x(m, n, 1, type);
                x.fill(random);
                Buffer bias(4 * c.rows);
                for (i64 i = 0; i < c.rows; ++i) put(bias.data(), i, Float::f32, random.normal());
                Buffer y = product(b, way, s.w, x.row(0), m, x.stride, type, bias.as<float>(), 1);
                for (int threads = 2; threads <= 3; ++threads)
                    CHECK(same(product(b, way, s.w, x.row(0), m, x.stride, type, bias.as<float>(), threads), y), "%s %lld x %lld on %d threads",
                          name_of(type), static_cast<long long>(c.rows), static_cast<long long>(c.cols), threads);
                for (auto [start, count] : {std::pair<i64, i64>{0, 1}, {529, 1}, {511, 2}, {3, 3}, {10, 4}, {400, 5}, {1, 6}, {2, 7}, {450, 40}}) {
                    // Of the last part, too, nothing lies behind.
                    Rows part(count, n, 0, type);
                    for (i64 i = 0; i < count; ++i)
                        for (i64 k = 0; k < n; ++k) part.set(i, k, x.at(start + i, k));
                    Buffer alone = product(b, way, s.w, part.row(0), count, n, type, bias.as<float>(), 1 + static_cast<int>(count) % 3);
                    CHECK(std::memcmp(alone.data(), y.data() + start * row_bytes, static_cast<std::size_t>(count * row_bytes)) == 0,
                          "%s %s %lld x %lld rows %lld + %lld", way == Way::forward ? "forward" : "backward", name_of(type),
                          static_cast<long long>(c.rows), static_cast<long long>(c.cols), static_cast<long long>(start), static_cast<long long>(count));
                }
            }
    }
}

void a_bad_row_spoils_itself_only(const Backend& b) {
    Random random(8);
    for (Float type : kTypes)
        for (Way way : {Way::forward, Way::backward})
            for (i64 m : {2, 6, 20}) {
                Stored s({48, 128, 64, true}, 0.04, 9);
                Rows x(m, way == Way::forward ? 128 : 48, 0, type);
                x.fill(random);
                const i64 row_bytes = (way == Way::forward ? 48 : 128) * width(type), bad = m / 2;
                Buffer clean = product(b, way, s.w, x.row(0), m, x.stride, type, nullptr, 1);
                x.set(bad, 5, NAN);
                Buffer y = product(b, way, s.w, x.row(0), m, x.stride, type, nullptr, 1);
                bool nan = true, equal = true;
                for (i64 o = 0; o < row_bytes / width(type); ++o) nan &= std::isnan(get(y.data() + bad * row_bytes, o, type));
                for (i64 i = 0; i < m; ++i)
                    equal &= i == bad || std::memcmp(y.data() + i * row_bytes, clean.data() + i * row_bytes, static_cast<std::size_t>(row_bytes)) == 0;
                CHECK(nan && equal, "%s %lld rows", name_of(type), static_cast<long long>(m));
            }
}

// A value takes the nearest of the table's, but for the 65,536 steps in between (bitsandbytes' way): at most half a step off.
void quantises_scales() {
    tally.where = "nested scales";
    Random random(10);
    Buffer table(4 * 256);
    for (int i = 0; i < 256; ++i) put(table.data(), i, Float::f32, std::pow((i - 127.5) / 127.5, 3));
    for (i64 n : {1, 255, 256, 257, 1000})
        for (double size : {0.1, 1e-30, 1e-42, 0.0}) {
            Buffer values(4 * n), codes(n), absmax(4 * ((n + 255) / 256));
            for (i64 i = 0; i < n; ++i) put(values.data(), i, Float::f32, i % 5 ? size * random.normal() : 0.0);
            nested_quantize(values.as<float>(), n, table.as<float>(), 256, codes.data(), absmax.as<float>());
            bool right = true;
            for (i64 i = 0; i < n; ++i) {
                double largest = absmax.as<float>()[i / 256], v = values.as<float>()[i], nearest = 2;
                right &= std::fabs(v) <= largest;
                if (largest == 0) right &= codes.data()[i] == 0;
                if (largest < 1e-38) continue;  // its reciprocal is infinite: no code is the nearest
                for (int c = 0; c < 256; ++c) nearest = std::fmin(nearest, std::fabs(table.as<float>()[c] - v / largest));
                right &= std::fabs(table.as<float>()[codes.data()[i]] - v / largest) <= nearest + 2.0 / 65535;
            }
            CHECK(right, "n=%lld size=%g", static_cast<long long>(n), size);
        }
}

}  // namespace
}  // namespace fourscore::test

int main(int count, char** arguments) {
    using namespace fourscore;
    using namespace fourscore::test;
    brief = count > 1 && std::strcmp(arguments[1], "--brief") == 0;
    constexpr std::pair<const char*, void (*)(const Backend&)> tests[] = {
        {"quantises", quantises},   {"finds what is not finite", finds_what_is_not_finite},     {"dequantises", dequantises},
        {"multiplies", multiplies}, {"rows do not see each other", rows_do_not_see_each_other}, {"a bad row spoils itself only", a_bad_row_spoils_itself_only}};
    std::string names;
    for (const Backend* b : backends()) {
        for (auto [name, test] : tests) {
            tally.where = std::string(b->name) + ": " + name;
            test(*b);
        }
        names += std::string(names.empty() ? "" : ", ") + b->name;
    }
    quantises_scales();
    std::printf("%ld checks, %ld failed; backends %s; %s\n", tally.checks, tally.failed, names.c_str(),
                kSanitized ? "sanitizers on" : "buffers before guard pages");
    return tally.failed ? 1 : 0;
}
