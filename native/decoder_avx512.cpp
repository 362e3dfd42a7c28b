#define FOURSCORE_ISA avx512
#include "decoder_dense.h"

namespace fourscore {
const DecoderKernels kAvx512Decoder{"avx512",
                                avx512::keys_bytes,
                                avx512::values_bytes,
                                avx512::scale_row,
                                avx512::norm_row,
                                avx512::add_row,
                                avx512::gate_row,
                                avx512::rope_row,
                                avx512::store_any_token,
                                avx512::attend,
                                avx512::dense,
                                avx512::add_low_rank,
                                avx512::cap_row};
}
