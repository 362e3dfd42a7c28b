// AVX-512 F, BW, DQ, VL, without bf16 instructions.
#define FOURSCORE_ISA avx512
#include "avx512.h"

namespace fourscore {
const Backend kAvx512{"avx512", avx512::quantize<avx512::Codec>, avx512::dequantize<avx512::Codec>, avx512::forward<avx512::F32Ops>,
                      avx512::backward<avx512::F32Ops>};
}
