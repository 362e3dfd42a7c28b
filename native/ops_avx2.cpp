#define FOURSCORE_ISA avx2
#include "dense.h"
#include "ops_attention.h"
#include "ops_rows.h"

namespace fourscore {
const Operations kAvx2Operations{"avx2", avx2::product, avx2::swiglu, avx2::swiglu_backward,   avx2::norm,
                                   avx2::norm_backward, avx2::rope,   avx2::nats, avx2::attention_forward,
                                   avx2::attention_backward};
}
