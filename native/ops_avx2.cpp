#define FOURSCORE_ISA avx2
#include "ops_rows.h"

namespace fourscore {
const Operations kAvx2Operations{"avx2", avx2::swiglu, avx2::swiglu_backward};
}
