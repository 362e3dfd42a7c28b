// What a training step computes beside its linear layers: one table of functions an instruction set. Tensors are f32 or bf16
// (`Float`), sums are made in f32 in one fixed order, and work is divided without regard to the number of threads: the same
// bits for any. Strides are in elements.
#pragma once

#include <cstdint>

#include "nf4.h"

namespace fourscore {

struct Operations {
    const char* name;
    // y[n] = silu(gate) * up, rounded once.
    void (*swiglu)(const void* gate, const void* up, Float type, std::int64_t n, void* y, int threads);
    // dgate and dup [n], from dy. Either may be the same memory as any of the inputs.
    void (*swiglu_backward)(const void* dy, const void* gate, const void* up, Float type, std::int64_t n, void* dgate, void* dup,
                            int threads);
};

extern const Operations kScalarOperations;
#ifdef FOURSCORE_X86
extern const Operations kAvx2Operations;
extern const Operations kAvx512Operations;
extern const Operations kAvx512Bf16Operations;
#endif

}  // namespace fourscore
