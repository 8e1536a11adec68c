// A device that is not the CPU and lives in host memory, for machines that have no other; see pretend_device.py.
//
// Its kernels are those of the CPU, which a fallback runs on the same memory. What makes it a device: numpy cannot read
// it, an op refuses tensors of two devices as those of CUDA do, copies to the host are counted, and it can be told to
// do without float64, as MPS does.
#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorShape.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <c10/core/CPUAllocator.h>
#include <atomic>
#include <cstring>
#include <string>

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
std::atomic<int64_t> to_host{0};
std::atomic<bool> has_float64{true};

void check_dtype(at::ScalarType type) {
  TORCH_CHECK_TYPE(
      has_float64 || (type != at::kDouble && type != at::kComplexDouble),
      "Cannot convert a tensor to float64, which this device does not have (as MPS does not)");
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = bytes == 0 ? nullptr : std::malloc(bytes);
    return {memory, memory, &std::free, c10::Device(kDevice, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Allocator allocator;
REGISTER_ALLOCATOR(kDevice, &allocator);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Device getDevice() const override { return c10::Device(kDevice, 0); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

void grow(const c10::Storage& storage, size_t bytes) {
  auto memory = allocator.allocate(bytes);
  if (storage.nbytes() > 0) std::memcpy(memory.get(), storage.data(), std::min(bytes, storage.nbytes()));
  storage.unsafeGetStorageImpl()->set_data_ptr(std::move(memory));
  storage.unsafeGetStorageImpl()->set_nbytes(bytes);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::Device getDeviceFromPtr(void*) const override { return c10::Device(kDevice, 0); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override { grow(storage, bytes); }
};

// The same memory, as the host sees it. Of another size it is memory of its own: see what the fallback does then.
at::Tensor on_host(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() != kDevice) return tensor;
  auto storage = tensor.storage();
  auto memory = c10::DataPtr(
      const_cast<void*>(storage.data()), new c10::Storage(storage),
      [](void* held) { delete static_cast<c10::Storage*>(held); }, c10::Device(c10::DeviceType::CPU));
  auto seen = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(), std::move(memory), c10::GetCPUAllocator(), true);
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(std::move(seen)), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) result._set_conj(true);
  if (tensor.is_neg()) result._set_neg(true);
  return result;
}

// The view of a tensor on the device that the host sees as ``seen``; of another dtype, perhaps.
at::Tensor view_of(const at::Tensor& there, const at::Tensor& seen) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(there.storage()), there.key_set(),
      seen.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(seen.sizes(), seen.strides(), seen.storage_offset());
  if (seen.is_conj()) result._set_conj(true);
  if (seen.is_neg()) result._set_neg(true);
  return result;
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  auto type = dtype.value_or(c10::typeMetaToScalarType(c10::get_default_dtype()));
  check_dtype(type);
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type);
}

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  auto type = dtype.value_or(c10::typeMetaToScalarType(c10::get_default_dtype()));
  check_dtype(type);
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type, format);
}

at::Tensor on_device(const at::Tensor& tensor) {
  auto result = empty_strided(tensor.sizes(), tensor.strides(), tensor.scalar_type(), {}, {}, {});
  on_host(result).copy_(tensor);
  return result;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  if (from.device().type() == kDevice && to.device().is_cpu()) ++to_host;
  on_host(to).copy_(on_host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar_dense(const at::Tensor& tensor) {
  ++to_host;
  return at::_local_scalar_dense(on_host(tensor));
}

const at::Tensor& resize_(const at::Tensor& tensor, c10::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  size_t bytes = (impl->storage_offset() + impl->numel()) * impl->itemsize();
  if (bytes > impl->storage().nbytes()) grow(impl->storage(), bytes);
  if (format.has_value()) impl->empty_tensor_restride(*format);
  return tensor;
}

at::Tensor& set_storage(at::Tensor& tensor, c10::Storage storage, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  if (stride.empty() && size.size() != 0) {
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  return tensor;
}

at::Tensor& set_source_storage(at::Tensor& tensor, c10::Storage storage) {
  int64_t size = storage.nbytes() / tensor.itemsize();
  return set_storage(tensor, std::move(storage), 0, {size}, {1});
}

at::Tensor& set_tensor(at::Tensor& tensor, const at::Tensor& source) {
  return set_storage(tensor, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor as_strided(const at::Tensor& tensor, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(tensor, size, stride, offset);
}

at::Tensor view(const at::Tensor& tensor, c10::IntArrayRef size) { return at::native::view(tensor, size); }

at::Tensor unfold(const at::Tensor& tensor, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(tensor, dim, size, step);
}

int64_t sdp_choice(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
    std::optional<double>, bool) {
  return 0;  // by products and softmax
}

at::Tensor convolution(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding, int64_t groups) {
  TORCH_CHECK(weight.device().type() == kDevice && (!bias || !bias->defined() || bias->device().type() == kDevice),
              "Expected all tensors to be on the same device (convolution)");
  return on_device(at::convolution(
      on_host(input), on_host(weight), bias ? std::optional(on_host(*bias)) : std::nullopt, stride, padding, dilation,
      transposed, output_padding, groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding,
    int64_t groups, std::array<bool, 3> mask) {
  int64_t outputs = transposed ? weight.size(1) * groups : weight.size(0);
  auto [a, b, c] = at::convolution_backward(
      on_host(grad), on_host(input), on_host(weight), at::OptionalIntArrayRef(c10::IntArrayRef(&outputs, 1)), stride,
      padding, dilation, transposed, output_padding, groups, mask);
  auto there = [](const at::Tensor& t) { return t.defined() ? on_device(t) : t; };
  return {there(a), there(b), there(c)};
}

// torch asks devices other than the CPU for whole cells of recurrent layers.

using Maybe = std::optional<at::Tensor>;

at::Tensor with_bias(const at::Tensor& gates, const Maybe& bias) {
  return bias && bias->defined() ? on_host(gates) + on_host(*bias) : on_host(gates);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell(
    const at::Tensor& from_input, const at::Tensor& from_hidden, const at::Tensor& cell, const Maybe& input_bias,
    const Maybe& hidden_bias) {
  auto gates = (with_bias(from_input, input_bias) + with_bias(from_hidden, hidden_bias)).chunk(4, 1);
  auto i = gates[0].sigmoid(), f = gates[1].sigmoid(), g = gates[2].tanh(), o = gates[3].sigmoid();
  auto next = f * on_host(cell) + i * g;
  return {on_device(o * next.tanh()), on_device(next), on_device(at::cat({i, f, g, o}, 1))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell_backward(
    const Maybe& grad_hidden, const Maybe& grad_cell, const at::Tensor& cell, const at::Tensor& next,
    const at::Tensor& workspace, bool has_bias) {
  auto gates = on_host(workspace).chunk(4, 1);
  auto i = gates[0], f = gates[1], g = gates[2], o = gates[3];
  auto squashed = on_host(next).tanh();
  auto of = [&](const Maybe& grad) -> at::Tensor { return grad && grad->defined() ? on_host(*grad) : at::zeros_like(squashed); };
  auto by_hidden = of(grad_hidden);
  auto by_cell = of(grad_cell) + by_hidden * o * (1 - squashed * squashed);
  auto grads = at::cat(
      {by_cell * g * i * (1 - i), by_cell * on_host(cell) * f * (1 - f), by_cell * i * (1 - g * g),
       by_hidden * squashed * o * (1 - o)}, 1);
  return {on_device(grads), on_device(by_cell * f), has_bias ? on_device(grads.sum(0)) : at::Tensor()};
}

std::tuple<at::Tensor, at::Tensor> gru_cell(
    const at::Tensor& from_input, const at::Tensor& from_hidden, const at::Tensor& hidden, const Maybe& input_bias,
    const Maybe& hidden_bias) {
  auto x = with_bias(from_input, input_bias).chunk(3, 1), h = with_bias(from_hidden, hidden_bias).chunk(3, 1);
  auto r = (x[0] + h[0]).sigmoid(), z = (x[1] + h[1]).sigmoid(), n = (x[2] + r * h[2]).tanh();
  auto before = on_host(hidden);
  return {on_device(n + z * (before - n)), on_device(at::cat({r, z, n, before, h[2]}, 1))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> gru_cell_backward(
    const at::Tensor& grad_hidden, const at::Tensor& workspace, bool has_bias) {
  auto held = on_host(workspace).chunk(5, 1);
  auto r = held[0], z = held[1], n = held[2], before = held[3], h = held[4], grad = on_host(grad_hidden);
  auto by_n = grad * (1 - z) * (1 - n * n);
  auto by_r = by_n * h * r * (1 - r), by_z = grad * (before - n) * z * (1 - z);
  auto x_grads = at::cat({by_r, by_z, by_n}, 1), h_grads = at::cat({by_r, by_z, by_n * r}, 1);
  auto bias = [&](const at::Tensor& grads) -> at::Tensor { return has_bias ? on_device(grads.sum(0)) : at::Tensor(); };
  return {on_device(x_grads), on_device(h_grads), on_device(grad * z), bias(x_grads), bias(h_grads)};
}

// Runs the kernel of the CPU on the same memory. What it makes anew goes to the device.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto many = schema.arguments().size();
  const auto first = stack->size() - many;
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;  // what is on the device, and as the host sees it
  const bool takes_host_index = schema.name().rfind("aten::index", 0) == 0 || schema.name() == "aten::_index_put_impl_";
  std::string others;
  auto see = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (tensor.device().type() != kDevice) {
      if (tensor.dim() > 0 && !takes_host_index) others = tensor.toString();
      return tensor;
    }
    pairs.emplace_back(tensor, on_host(tensor));
    return pairs.back().second;
  };
  for (size_t i = 0; i < many; ++i) {
    auto& value = (*stack)[first + i];
    if (value.isTensor()) {
      value = see(value.toTensor());
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (auto& tensor : list) tensor = see(tensor);
      value = c10::List<at::Tensor>(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& entry : value.toOptionalTensorList()) {
        std::optional<at::Tensor> tensor = entry;
        list.push_back(tensor ? std::optional(see(*tensor)) : std::nullopt);
      }
      value = list;
    } else if (value.isDevice() && value.toDevice().type() == kDevice) {
      value = c10::Device(c10::DeviceType::CPU);
    }
  }
  TORCH_CHECK(
      others.empty() || pairs.empty(), "Expected all tensors to be on the same device, but ", schema.name(),
      " was given one on the host: ", others);
  op.callBoxedForDispatchKey(c10::DispatchKey::CPU, *stack);
  auto back = [&](const at::Tensor& tensor) -> at::Tensor {
    if (!tensor.defined()) return tensor;
    for (auto& [there, here] : pairs) {
      if (here.is_same(tensor)) return there;
      if (tensor.storage().data() && here.storage().data() == tensor.storage().data())
        return view_of(there, tensor);
    }
    return on_device(tensor);
  };
  for (auto& [there, here] : pairs) {  // what the kernel gave another size or order
    if (here.storage().data() != there.storage().data()) {
      there.resize_(here.sizes());
      on_host(there).copy_(here);
    } else if (here.sizes() != there.sizes() || here.strides() != there.strides()) {
      there.unsafeGetTensorImpl()->set_sizes_and_strides(here.sizes(), here.strides());
    }
  }
  const auto results = schema.returns().size();
  for (size_t i = stack->size() - results; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = back(value.toTensor());
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (auto& tensor : list) tensor = back(tensor);
      value = c10::List<at::Tensor>(list);
    }
  }
}

int64_t copies_to_host() { return to_host; }

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", [](const at::Tensor& t, c10::IntArrayRef size, c10::IntArrayRef stride) {
    return at::native::as_strided_tensorimpl(t, size, stride, t.storage_offset());
  });
  m.impl("unfold", &unfold);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage", &set_source_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("_fused_sdp_choice", &sdp_choice);
  m.impl("convolution_overrideable", &convolution);
  m.impl("_thnn_fused_lstm_cell", &lstm_cell);
  m.impl("_thnn_fused_lstm_cell_backward_impl", &lstm_cell_backward);
  m.impl("_thnn_fused_gru_cell", &gru_cell);
  m.impl("_thnn_fused_gru_cell_backward", &gru_cell_backward);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}

// A copy resolves what is conjugated or negated by itself.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY(pretend_device, m) { 
  m.def("copies_to_host() -> int", &copies_to_host);
  m.def("has_float64(bool answer) -> ()", [](bool answer) { has_float64 = answer; });
}

static bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();
