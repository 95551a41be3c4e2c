// Shared by the CPU kernels, besides common.h: the mapping from torch's dtypes to those of csrc/core, and aligned
// scratch.
#pragma once

#include <cmath>
#include <memory>
#include <new>
#include <type_traits>

#include "../common.h"
#include "../core/dtype.h"

namespace bdprune {

inline core::Dtype core_dtype(ScalarType dtype) {
  return dispatch_floating(dtype, [](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (std::is_same_v<T, float>) return core::Dtype::kFloat;
    if constexpr (std::is_same_v<T, double>) return core::Dtype::kDouble;
    if constexpr (std::is_same_v<T, torch::headeronly::Half>) return core::Dtype::kHalf;
    if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) return core::Dtype::kBFloat16;
  });
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
