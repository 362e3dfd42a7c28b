// The Python face of the decoder.
#pragma once

#include <nanobind/nanobind.h>

#include "nf4.h"

namespace fourscore {

// Decoders made from now on use this backend.
void choose_decoder(const Backend&);
void define_decoder(nanobind::module_& m);

}  // namespace fourscore
