#define FOURSCORE_ISA avx512
#include "ops_rows.h"

namespace fourscore {
const Operations kAvx512Operations{"avx512", avx512::swiglu, avx512::swiglu_backward};
}
