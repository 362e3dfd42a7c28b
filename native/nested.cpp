// Double quantisation: the scales themselves as 8-bit codes. Once a model, a sixty-fourth of the weights: plain C++.
#include <cmath>
#include <cstring>
#include <mutex>
#include <vector>

#include "nf4.h"

namespace fourscore {

void nested_quantize(const float* v, std::int64_t n, const float* t, std::int64_t block, std::uint8_t* codes, float* absmax) {
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
    for (std::int64_t b = 0; b * block < n; ++b) {
        std::int64_t end = n < (b + 1) * block ? n : (b + 1) * block;
        float largest = 0;
        for (std::int64_t i = b * block; i < end; ++i) largest = std::fabs(v[i]) > largest ? std::fabs(v[i]) : largest;
        absmax[b] = largest;
        if (largest == 0) {
            std::memset(codes + b * block, 0, static_cast<std::size_t>(end - b * block));
            continue;
        }
        float inverse = 1.0f / largest;
        for (std::int64_t i = b * block; i < end; ++i) {
            float s = v[i] * inverse;
            s = s < -1 ? -1 : s > 1 ? 1 : s;
            // The original fuses this product and sum; in f64 both are exact, so it is rounded once here too.
            float step = static_cast<float>(static_cast<double>((s + 1.0f) * 0.5f) * 65535.0 + 0.5);
            // Not a number: zero in a block so small that its reciprocal is infinite.
            codes[i] = steps[step >= 0 ? static_cast<std::uint16_t>(step) : 0];
        }
    }
}

}  // namespace fourscore
