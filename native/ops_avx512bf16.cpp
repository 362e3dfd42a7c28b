#define FOURSCORE_ISA avx512bf16
#include "dense.h"
#include "ops_attention.h"
#include "ops_rows.h"

namespace fourscore {
const Operations kAvx512Bf16Operations{"avx512-bf16", avx512bf16::product, avx512bf16::swiglu, avx512bf16::swiglu_backward,   avx512bf16::norm,
                                   avx512bf16::norm_backward, avx512bf16::rope,   avx512bf16::nats, avx512bf16::attention_forward,
                                   avx512bf16::attention_backward};
}
