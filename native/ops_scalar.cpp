#define FOURSCORE_ISA scalar
#include "dense.h"
#include "ops_attention.h"
#include "ops_rows.h"

namespace fourscore {
const Operations kScalarOperations{"scalar", scalar::product, scalar::swiglu, scalar::swiglu_backward,   scalar::norm,
                                   scalar::norm_backward, scalar::rope,   scalar::nats, scalar::attention_forward,
                                   scalar::attention_backward};
}
