#define FOURSCORE_ISA scalar
#include "ops_rows.h"

namespace fourscore {
const Operations kScalarOperations{"scalar", scalar::swiglu, scalar::swiglu_backward};
}
