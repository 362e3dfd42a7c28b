#define FOURSCORE_ISA avx2
#include "decoder_dense.h"

namespace fourscore {
const DecoderKernels kAvx2Decoder{"avx2",
                                avx2::keys_bytes,
                                avx2::values_bytes,
                                avx2::scale_row,
                                avx2::norm_row,
                                avx2::add_row,
                                avx2::gate_row,
                                avx2::rope_row,
                                avx2::store_any_token,
                                avx2::attend,
                                avx2::dense,
                                avx2::add_low_rank,
                                avx2::cap_row};
}
