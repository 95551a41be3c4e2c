// What the CPU kernels share beyond common.h: the bridge from torch's dtypes to those of csrc/core, and aligned
// scratch.
#pragma once

#include <cmath>
#include <memory>
#include <new>

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

// Element i of an array of any floating dtype.
inline double read_scalar(const void* data, core::Dtype dtype, int64_t i) {
  switch (dtype) {
    case core::Dtype::kFloat:
      return static_cast<const float*>(data)[i];
    case core::Dtype::kDouble:
      return static_cast<const double*>(data)[i];
    case core::Dtype::kHalf:
      return core::widen(static_cast<const core::Half*>(data)[i]);
    default:
      return core::widen(static_cast<const core::BFloat16*>(data)[i]);
  }
}

// Uninitialised memory aligned to a vector register.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t bytes) : data_(::operator new(static_cast<size_t>(bytes), kAlignment)) {}
  void* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(void* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<void, Delete> data_;
};

}  // namespace bdprune
