// The Python face of the operations.
#pragma once

#include <nanobind/nanobind.h>

namespace fourscore {

// Takes the operations of the backend of that name.
void choose_operations(const char* name);
void define_operations(nanobind::module_& m);

}  // namespace fourscore
