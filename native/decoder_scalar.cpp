#define FOURSCORE_ISA scalar
#include "decoder_dense.h"

namespace fourscore {
const DecoderKernels kScalarDecoder{"scalar",
                                scalar::keys_bytes,
                                scalar::values_bytes,
                                scalar::scale_row,
                                scalar::norm_row,
                                scalar::add_row,
                                scalar::gate_row,
                                scalar::rope_row,
                                scalar::store_any_token,
                                scalar::attend,
                                scalar::dense,
                                scalar::add_low_rank,
                                scalar::cap_row};
}
