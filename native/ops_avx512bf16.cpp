#define FOURSCORE_ISA avx512bf16
#include "ops_rows.h"

namespace fourscore {
const Operations kAvx512Bf16Operations{"avx512-bf16", avx512bf16::swiglu, avx512bf16::swiglu_backward};
}
