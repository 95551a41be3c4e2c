// A stand-in for a GPU with the memory and the kernels of the CPU. It rejects the same operations as a GPU: tensors of
// both devices in one operation, and random numbers on the device from a generator of the CPU.

#include <torch/library.h>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr auto kPretend = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kPretend, 0);

// One device with one stream, which runs everything immediately.
struct Guard : c10::impl::NoOpDeviceGuardImpl<kPretend> {
  c10::Stream stream() const { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
};
const bool kHooked = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);

// Device memory that keeps a CPU storage alive, and vice versa.
c10::DataPtr held(const c10::Storage& storage, c10::Device device) {
  auto* context = new c10::Storage(storage);
  return {storage.mutable_data(), context, [](void* one) { delete static_cast<c10::Storage*>(one); }, device};
}

c10::Storage moved(const c10::Storage& storage, c10::Device device, c10::Allocator* allocator) {
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), held(storage, device), allocator, true);
}

struct Allocator : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto memory = c10::GetCPUAllocator()->allocate(bytes);
    void* data = memory.get();
    return {data, memory.release_context(), memory.get_deleter(), kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return c10::GetCPUAllocator()->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Allocator allocator;
REGISTER_ALLOCATOR(kPretend, &allocator);

at::Tensor laid_over(const at::Tensor& shape, c10::Storage storage, c10::DispatchKey key) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), shape.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(shape.sizes(), shape.strides(), shape.storage_offset());
  return tensor;
}

// The arguments of one call: the tensors on the device, and their counterparts on the CPU.
struct Call {
  std::vector<std::pair<at::Tensor, at::Tensor>> known;  // on the device, on the CPU
  std::vector<std::pair<c10::Storage, c10::Storage>> storages;

  at::Tensor on_cpu(const at::Tensor& theirs) {
    if (!theirs.defined() || !theirs.is_privateuseone()) return theirs;
    for (auto& [one, ours] : known)
      if (one.is_same(theirs)) return ours;
    c10::Storage found;
    for (auto& [one, ours] : storages)
      if (one.is_alias_of(theirs.storage())) found = ours;
    if (!found) {
      found = moved(theirs.storage(), c10::Device(c10::kCPU), c10::GetCPUAllocator());
      storages.emplace_back(theirs.storage(), found);
    }
    auto ours = laid_over(theirs, found, c10::DispatchKey::CPU);
    if (theirs.unsafeGetTensorImpl()->is_wrapped_number()) ours.unsafeGetTensorImpl()->set_wrapped_number(true);
    known.emplace_back(theirs, ours);
    return ours;
  }

  at::Tensor on_device(const at::Tensor& ours) {
    if (!ours.defined() || !ours.is_cpu()) return ours;
    for (auto& [theirs, one] : known)
      if (one.is_same(ours)) return theirs;
    for (auto& [theirs, one] : storages)
      if (one.is_alias_of(ours.storage()) && one.data() == theirs.data())
        return laid_over(ours, theirs, c10::DispatchKey::PrivateUse1);
    auto fresh = moved(ours.storage(), kDevice, &allocator);
    return laid_over(ours, fresh, c10::DispatchKey::PrivateUse1);
  }

  // Tensors that the call resized or gave other memory.
  void write_back() {
    for (auto& [theirs, ours] : known) {
      auto* impl = theirs.unsafeGetTensorImpl();
      if (theirs.storage().data() != ours.storage().data() || theirs.storage().nbytes() != ours.storage().nbytes())
        impl->set_storage_keep_dtype(moved(ours.storage(), kDevice, &allocator));
      if (theirs.sizes() != ours.sizes() || theirs.strides() != ours.strides())
        impl->set_sizes_and_strides(ours.sizes(), ours.strides(), ours.storage_offset());
    }
  }
};

void visit(c10::IValue& value, const std::function<at::Tensor(const at::Tensor&)>& change) {
  if (value.isTensor()) {
    value = change(value.toTensor());
  } else if (value.isTensorList()) {
    std::vector<at::Tensor> tensors = value.toTensorVector();
    for (auto& tensor : tensors) tensor = change(tensor);
    value = c10::List<at::Tensor>(tensors);
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> tensors;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
      tensors.push_back(tensor ? std::optional(change(*tensor)) : std::nullopt);
    value = tensors;
  }
}

void check(const c10::FunctionSchema& schema, c10::ArrayRef<c10::IValue> arguments) {
  const std::string& name = schema.name();
  const bool lists = name == "aten::cat" || name == "aten::stack";
  bool on_device = false, drawn = false;
  const c10::Argument* on_cpu = nullptr;
  for (size_t index = 0; index < arguments.size(); ++index) {
    const c10::Argument& declared = schema.arguments()[index];
    auto value = arguments[index];
    if (value.isGenerator()) drawn = value.toGenerator().defined() && value.toGenerator().device().is_cpu();
    if (value.isDevice()) on_device |= value.toDevice().type() == kPretend;
    const bool places = value.isOptionalTensorList();  // a GPU takes indices from the CPU
    const bool written = declared.alias_info() && declared.alias_info()->isWrite();
    visit(value, [&](const at::Tensor& tensor) {
      if (tensor.defined() && tensor.is_privateuseone()) on_device = true;
      if (tensor.defined() && tensor.is_cpu() && !places && (tensor.dim() > 0 || written || lists)) on_cpu = &declared;
      return tensor;
    });
  }
  TORCH_CHECK(!on_device || !on_cpu, "Expected all tensors to be on the same device: ", on_cpu ? on_cpu->name() : "",
              " of ", name, " is on the CPU, another argument on the pretend device");
  TORCH_CHECK(!on_device || !drawn, "Expected a generator of the pretend device, ", name, " got one of the CPU");
}

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size(), begin = stack->size() - count;
  check(schema, c10::ArrayRef<c10::IValue>(stack->data() + begin, count));
  Call call;
  for (size_t index = begin; index < stack->size(); ++index) {
    auto& value = (*stack)[index];
    if (value.isDevice() && value.toDevice().type() == kPretend) value = c10::Device(c10::kCPU);
    visit(value, [&](const at::Tensor& tensor) { return call.on_cpu(tensor); });
  }
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  call.write_back();
  for (size_t index = stack->size() - schema.returns().size(); index < stack->size(); ++index)
    visit((*stack)[index], [&](const at::Tensor& tensor) { return call.on_device(tensor); });
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  const auto options = at::TensorOptions().dtype(dtype);
  return Call().on_device(at::empty_strided(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), options));
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return Call().on_device(at::empty(C10_AS_INTARRAYREF_SLOW(size), at::TensorOptions().dtype(dtype), format));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  Call call;
  at::AutoDispatchBelowADInplaceOrView below;
  call.on_cpu(to).copy_(call.on_cpu(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  return set_storage(self, std::move(storage), 0, {count}, {1});
}

void same_device(const at::Tensor& one, const at::Tensor& other) {
  TORCH_CHECK(one.device() == other.device(), "Expected all tensors to be on the same device: a convolution got ",
              one.device(), " and ", other.device());
}

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                       bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  same_device(input, weight);
  if (bias && bias->defined()) same_device(input, *bias);
  Call call;
  at::AutoDispatchBelowADInplaceOrView below;
  auto ours = bias && bias->defined() ? std::optional(call.on_cpu(*bias)) : std::nullopt;
  return call.on_device(at::convolution_symint(call.on_cpu(input), call.on_cpu(weight), ours, stride, padding, dilation,
                                               transposed, output_padding, groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> wanted) {
  same_device(grad, input);
  same_device(grad, weight);
  Call call;
  at::AutoDispatchBelowADInplaceOrView below;
  const std::vector<c10::SymInt> bias = {weight.sym_size(transposed ? 1 : 0) * (transposed ? groups : c10::SymInt(1))};
  auto [one, two, three] = at::convolution_backward_symint(call.on_cpu(grad), call.on_cpu(input), call.on_cpu(weight),
                                                           c10::SymIntArrayRef(bias), stride, padding, dilation,
                                                           transposed, output_padding, groups, wanted);
  return {call.on_device(one), call.on_device(two), call.on_device(three)};
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

// The same as CUDA's autocast, with the same lists.
namespace at::autocast {
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define OPTIONAL_DTYPE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define APPENDED_DTYPE(...) KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE(__VA_ARGS__)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FLOAT32)
  AT_FORALL_FP32_SET_OPT_DTYPE(OPTIONAL_DTYPE)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(APPENDED_DTYPE)
  AT_FORALL_PROMOTE(WIDEST)
}
}  // namespace at::autocast

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("set_.source_Storage", set_whole_storage);
  library.impl("convolution_overrideable", convolution);
  library.impl("native_group_norm", torch::CppFunction::makeFromBoxedFunction<&fallback>());  // not the composite one
  library.impl("convolution_backward_overrideable", convolution_backward);
}
