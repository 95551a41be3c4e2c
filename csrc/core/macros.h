// Macros that let one header serve host and device code. Nothing in csrc/core depends on torch or Python.
#pragma once

#if defined(__CUDACC__)
#define BDP_HD __host__ __device__
#else
#define BDP_HD
#endif

#define BDP_INLINE inline __attribute__((always_inline))
