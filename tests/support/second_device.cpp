// The device `hpu` for tests: memory of its own kind, arithmetic by the CPU's kernels on that memory.
//
// A call on its tensors runs on CPU tensors of the same memory. As on CUDA, tensors of both devices cannot meet in one
// call (tensors of no dimension and indices excepted), and what the host needs of the device is a wait.

#include <ATen/ATen.h>
#include <ATen/detail/HPUHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <set>
#include <unordered_map>

namespace {

using c10::Device;
using c10::DeviceType;

const Device SECOND(DeviceType::HPU, 0);
std::atomic<int64_t> live{0}, peak{0};
pybind11::object* listener = nullptr;

void tell(const char* event, const std::string& what) {
  if (listener == nullptr || !Py_IsInitialized()) return;
  pybind11::gil_scoped_acquire held;
  (*listener)(event, what);
}

// ---- memory ----

struct Block {
  c10::Storage held;  // the CPU's memory
  int64_t bytes;
};

void drop(void* context) {
  auto block = static_cast<Block*>(context);
  live -= block->bytes;
  delete block;
}

c10::DataPtr on_second(c10::Storage memory) {
  auto bytes = static_cast<int64_t>(memory.nbytes());
  auto data = memory.mutable_data();
  live += bytes;
  if (live > peak) peak = live.load();
  return {data, new Block{std::move(memory), bytes}, &drop, SECOND};
}

c10::Storage cpu_storage(size_t bytes) {
  return c10::Storage(c10::Storage::use_byte_size_t(), bytes, c10::GetAllocator(DeviceType::CPU), true);
}

struct SecondAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override { return on_second(cpu_storage(bytes)); }
  c10::DeleterFnPtr raw_deleter() const override { return &drop; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
} allocator;

// ---- calls ----

struct Call {
  // CPU storages of the same memory as the device's, and which they are; CPU tensors and whose twins they are.
  std::unordered_map<c10::StorageImpl*, c10::Storage> twins;
  std::unordered_map<c10::StorageImpl*, c10::Storage> owners;
  std::unordered_map<c10::TensorImpl*, at::Tensor> originals;
  std::vector<at::Tensor> kept;

  at::Tensor twin(const at::Tensor& tensor) {
    const auto& storage = tensor.storage();
    auto impl = storage.unsafeGetStorageImpl();
    if (!twins.count(impl)) {
      auto release = [](void* context) { delete static_cast<c10::Storage*>(context); };
      c10::DataPtr data(storage.mutable_data(), new c10::Storage(storage), release, Device(DeviceType::CPU));
      c10::Storage shared(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data),
                          c10::GetAllocator(DeviceType::CPU), true);
      owners.emplace(shared.unsafeGetStorageImpl(), storage);
      twins.emplace(impl, std::move(shared));
    }
    auto made = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(twins.at(impl)), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    if (tensor.is_conj()) made._set_conj(true);
    if (tensor.is_neg()) made._set_neg(true);
    originals.emplace(made.unsafeGetTensorImpl(), tensor);
    kept.push_back(made);
    return made;
  }

  // Give memory and shape that a call changed back to the device's tensors.
  void settle() {
    for (auto& [impl, shared] : twins) {
      auto& owner = owners.at(shared.unsafeGetStorageImpl());
      if (shared.mutable_data() == owner.mutable_data() && shared.nbytes() == owner.nbytes()) continue;
      owner.set_data_ptr_noswap(on_second(shared));
      owner.set_nbytes(shared.nbytes());
    }
    for (auto& made : kept) {
      auto& original = originals.at(made.unsafeGetTensorImpl());
      if (made.sizes() != original.sizes() || made.strides() != original.strides())
        original.unsafeGetTensorImpl()->set_sizes_and_strides(made.sizes(), made.strides(), made.storage_offset());
    }
  }

  at::Tensor outer(const at::Tensor& result) {
    if (!result.defined() || !result.is_cpu()) return result;
    auto same = originals.find(result.unsafeGetTensorImpl());
    if (same != originals.end()) return same->second;
    auto owner = owners.find(result.storage().unsafeGetStorageImpl());
    auto storage = owner != owners.end()
        ? owner->second
        : c10::Storage(c10::Storage::use_byte_size_t(), result.storage().nbytes(), on_second(result.storage()),
                       &allocator, true);
    auto made = at::detail::make_tensor<c10::TensorImpl>(
        std::move(storage), c10::DispatchKeySet(c10::DispatchKey::HPU), result.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides(), result.storage_offset());
    if (result.is_conj()) made._set_conj(true);
    if (result.is_neg()) made._set_neg(true);
    return made;
  }
};

const std::set<std::string> WAITING = {"aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2",
                                       "aten::unique_dim", "aten::unique_consecutive"};

void refuse(const std::string& name, const at::Tensor& stranger) {
  std::ostringstream text;
  text << name << ": expected all tensors on one device, but found one of shape " << stranger.sizes()
       << " on the CPU beside the second device";
  TORCH_CHECK(false, text.str());
}

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto name = op.schema().name();
  const auto count = op.schema().arguments().size();
  Call call;
  std::vector<at::Tensor> strangers;
  bool here = false, masked = false, indices = false;  // indices may lie on the CPU
  auto inner = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (tensor.device().type() == DeviceType::HPU) {
      here = true;
      masked |= tensor.scalar_type() == at::kBool;
      return call.twin(tensor);
    }
    if (tensor.is_cpu() && tensor.dim() > 0 && !indices) strangers.push_back(tensor);
    return tensor;
  };
  for (auto at = stack->size() - count; at < stack->size(); ++at) {
    auto& value = (*stack)[at];
    if (value.isTensor()) {
      value = inner(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(inner(tensor));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      indices = true;
      for (std::optional<at::Tensor> tensor : value.toOptionalTensorList())
        list.push_back(tensor.has_value() ? std::optional(inner(*tensor)) : std::nullopt);
      value = list;
      indices = false;
    } else if (value.isDevice() && value.toDevice().type() == DeviceType::HPU) {
      value = Device(DeviceType::CPU);
    }
  }
  if (here && !strangers.empty()) refuse(name, strangers.front());
  if (WAITING.count(name) || (name == "aten::_index_put_impl_" && masked)) tell("wait", name);
  op.callBoxed(stack);
  call.settle();
  for (auto& value : *stack) {
    if (value.isTensor()) {
      value = call.outer(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(call.outer(tensor));
      value = list;
    }
  }
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool) {
  Call call;
  auto plain = [&](const at::Tensor& tensor) { return tensor.is_cpu() ? tensor : call.twin(tensor); };
  if (source.is_cpu() != target.is_cpu())
    tell(target.is_cpu() ? "wait" : "upload", std::to_string(source.nbytes()) + " bytes");
  plain(target).copy_(plain(source));
  return target;
}

at::Scalar item(const at::Tensor& tensor) {
  tell("wait", "item");
  Call call;
  return call.twin(tensor).item();
}

// Convolutions ask each device for its own.
at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                       at::IntArrayRef output_padding, int64_t groups) {
  if (input.is_cpu()) refuse("convolution", input);
  if (weight.is_cpu()) refuse("convolution", weight);
  Call call;
  std::optional<at::Tensor> added;
  if (bias.has_value() && bias->defined()) added = call.twin(*bias);
  return call.outer(at::convolution(call.twin(input), call.twin(weight), added, stride, padding, dilation, transposed,
                                    output_padding, groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> wanted) {
  Call call;
  at::OptionalIntArrayRef bias(at::IntArrayRef(weight.sizes().data(), 1));
  auto [a, b, c] = at::convolution_backward(call.twin(grad), call.twin(input), call.twin(weight), bias, stride, padding,
                                            dilation, transposed, output_padding, groups, wanted);
  return {call.outer(a), call.outer(b), call.outer(c)};
}

TORCH_LIBRARY_IMPL(_, HPU, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

TORCH_LIBRARY_IMPL(aten, HPU, m) {
  m.impl("_copy_from", &copy_from);
  m.impl("_local_scalar_dense", &item);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  // Calls that torch would take apart on a device without its own.
  for (auto name : {"empty.memory_format", "empty_strided", "native_group_norm", "native_group_norm_backward",
                    "native_layer_norm", "native_layer_norm_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
}

// Copies know conjugates and negatives themselves; else a copy would be asked for to make them plain.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

// ---- what autograd and torch's Python ask of a device; work is done when a call returns ----

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::Stream only() const { return c10::Stream(c10::Stream::DEFAULT, SECOND); }
  DeviceType type() const override { return DeviceType::HPU; }
  Device exchangeDevice(Device) const override { return SECOND; }
  Device getDevice() const override { return SECOND; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const noexcept override { return only(); }
  c10::Stream getNewStream(Device, int) const override { return only(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return only(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

C10_REGISTER_GUARD_IMPL(HPU, Guard);

struct HPUHooks final : at::HPUHooksInterface {
  explicit HPUHooks(at::HPUHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasHPU() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(DeviceType::CPU); }
};

}  // namespace

namespace at {
REGISTER_HPU_HOOKS(HPUHooks)
}

PYBIND11_MODULE(second_device_native, m) {
  c10::SetAllocator(DeviceType::HPU, &allocator);
  m.def("listen", [](pybind11::object each) {
    listener = each.is_none() ? nullptr : new pybind11::object(each);
  });
  m.def("live", [] { return live.load(); });
  m.def("peak", [] { return peak.load(); });
  m.def("reset_peak", [] { peak = live.load(); });
}
