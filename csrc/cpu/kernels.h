// What the CPU kernels share beyond common.h: the bridge from torch's dtypes to those of csrc/core.
#pragma once

#include <cmath>

#include "../common.h"
#include "../core/spectral.h"

namespace bdprune {

inline core::Dtype core_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return core::Dtype::kFloat;
    case ScalarType::Double:
      return core::Dtype::kDouble;
    case ScalarType::Half:
      return core::Dtype::kHalf;
    default:
      BDP_CHECK(dtype == ScalarType::BFloat16, "dtype must be float16, bfloat16, float32 or float64, got code ",
                static_cast<int>(dtype));
      return core::Dtype::kBFloat16;
  }
}

}  // namespace bdprune
