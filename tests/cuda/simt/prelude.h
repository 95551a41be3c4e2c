// Included before each csrc/cuda/*.cu and csrc/ops.cpp in the emulated build: the ops go to the namespace bdprune_simt,
// their kernels to the CPU key, and checks for the CUDA device check for the CPU.
#pragma once

#define aoti_torch_device_type_cuda simt_device_type_cuda
#define aoti_torch_create_device_guard simt_create_device_guard
#define aoti_torch_delete_device_guard simt_delete_device_guard

#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(bdprune_simt, m)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) _STABLE_TORCH_LIBRARY_IMPL(bdprune_simt, CPU, m, C10_UID)
