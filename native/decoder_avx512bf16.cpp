#define FOURSCORE_ISA avx512bf16
#include "decoder_dense.h"

namespace fourscore {
const DecoderKernels kAvx512Bf16Decoder{"avx512-bf16",
                                avx512bf16::keys_bytes,
                                avx512bf16::values_bytes,
                                avx512bf16::scale_row,
                                avx512bf16::norm_row,
                                avx512bf16::add_row,
                                avx512bf16::gate_row,
                                avx512bf16::rope_row,
                                avx512bf16::store_any_token,
                                avx512bf16::attend,
                                avx512bf16::dense,
                                avx512bf16::add_low_rank,
                                avx512bf16::cap_row};
}
