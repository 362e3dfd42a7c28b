// Which backends this machine can run.
#include "nf4.h"

namespace fourscore {

std::vector<const Backend*> backends() {
    std::vector<const Backend*> found;
#ifdef FOURSCORE_X86
    __builtin_cpu_init();
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl");
    if (wide && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi")) found.push_back(&kAvx512Bf16);
    if (wide) found.push_back(&kAvx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) found.push_back(&kAvx2);
#endif
#ifdef FOURSCORE_ARM64
    found.push_back(&kNeon);
#endif
    found.push_back(&kScalar);
    return found;
}

}  // namespace fourscore
