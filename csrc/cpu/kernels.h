// Shared by the CPU kernels, besides common.h: the mapping from torch's dtypes to those of csrc/core, and aligned
// scratch.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cmath>
#include <cstdint>
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

// Asks the system for huge pages for a large result that is yet to be written. malloc gives large blocks back to the
// system, and the first access to each small page of a new block takes longer than the memory traffic.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kLarge = 4 << 20;  // holds at least one whole huge page
  constexpr uintptr_t kPage = 4096;
  if (bytes < kLarge) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // without effect where it is refused
#endif
}

}  // namespace bdprune
