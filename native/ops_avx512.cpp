#define FOURSCORE_ISA avx512
#include "dense.h"
#include "ops_attention.h"
#include "ops_rows.h"

namespace fourscore {
const Operations kAvx512Operations{"avx512", avx512::product, avx512::swiglu, avx512::swiglu_backward,   avx512::norm,
                                   avx512::norm_backward, avx512::rope,   avx512::nats, avx512::attention_forward,
                                   avx512::attention_backward};
}
