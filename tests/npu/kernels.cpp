// The operators of the fake card: torch_npu's own registrations are replaced by torch's CPU kernels, which work on the
// card's memory in place (it is host memory). The front end (device module, autocast, scalers, reducer) stays torch_npu's.
//
// What the hardware refuses is refused here: mixed devices, float64, bfloat16 on the first generation. Operators that
// torch_npu does not register for the card are not replaced either: they end in its own CPU fall-back, which
// TORCH_NPU_FALLBACK_CPU_DISABLE=1 turns into an error.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <map>
#include <mutex>
#include <set>
#include <string>

extern "C" int fake_npu_is_first_generation(void);
extern "C" int fake_npu_current(void);
extern "C" int fake_npu_overflow(void);
extern "C" void fake_npu_set_overflow(int);

namespace {
using c10::DispatchKey;
using c10::IValue;
using Arguments = std::vector<c10::Argument>;

// --- what ran where, for $FAKE_NPU_STATS/rank<RANK>.json
struct Statistics {
  std::mutex mutex;
  std::map<int, std::map<std::string, long>> calls;  // card -> operator -> number
  long copies_to_host = 0, largest_to_host = 0, copies_to_card = 0;
  pid_t process = 0;  // the one that computes: forked workers inherit the numbers, and must not write them

  static const char* rank() {
    const char* text = std::getenv("RANK");
    return text ? text : "0";
  }
  long count(int card, const std::string& name) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!process) process = getpid();
    return ++calls[card][name];
  }
  void count_copy(const at::Tensor& to, const at::Tensor& from) {
    std::lock_guard<std::mutex> lock(mutex);
    if (from.is_cpu()) {
      copies_to_card++;
    } else if (to.is_cpu()) {
      copies_to_host++;
      largest_to_host = std::max<long>(largest_to_host, from.numel());
    }
  }
  void write() {
    const char* folder = std::getenv("FAKE_NPU_STATS");
    if (!folder || getpid() != process || calls.empty()) return;
    std::ofstream file(std::string(folder) + "/rank" + rank() + ".json");
    file << "{\"copies_to_host\": " << copies_to_host << ", \"largest_to_host\": " << largest_to_host
         << ", \"copies_to_card\": " << copies_to_card << ", \"calls\": {";
    const char* comma = "";
    for (auto& [card, names] : calls) {
      file << comma << "\"" << card << "\": {";
      comma = "";
      for (auto& [name, number] : names) {
        file << comma << "\"" << name << "\": " << number;
        comma = ", ";
      }
      file << "}";
    }
    file << "}}\n";
  }
} statistics;

// --- views of card memory for the CPU kernels, and results back
at::Tensor host(const at::Tensor& t) {
  if (!t.defined() || t.is_cpu()) return t;
  return at::from_blob(t.numel() ? t.data_ptr() : nullptr, t.sizes(), t.strides(), t.options().device(at::kCPU));
}

at::Tensor to_card(const at::Tensor& t, at::Device card) {
  if (!t.defined()) return t;
  at::Tensor source = t.is_non_overlapping_and_dense() ? t : t.contiguous();
  at::Tensor result = at::empty_strided(source.sizes(), source.strides(), source.options().device(card));
  if (t.numel()) std::memcpy(result.data_ptr(), source.data_ptr(), source.nbytes());
  return result;
}

template <typename Visitor>
void for_each_tensor(const IValue& value, Visitor visit) {
  if (value.isTensor()) {
    visit(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& t : value.toTensorVector()) visit(t);
  } else if (value.isOptionalTensorList()) {
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector())
      if (t) visit(*t);
  }
}

bool is_written(const c10::Argument& argument) { return argument.alias_info() && argument.alias_info()->isWrite(); }
bool is_out(const c10::Argument& argument) { return is_written(argument) && argument.kwarg_only(); }

// --- what a card refuses
at::Device find_card(const std::string& name, const Arguments& arguments, const IValue* values) {
  std::optional<at::Device> card, asked;
  for (size_t i = 0; i < arguments.size(); i++) {
    if (values[i].isDevice()) asked = values[i].toDevice();
    for_each_tensor(values[i], [&](const at::Tensor& t) {
      if (t.defined() && !t.is_cpu() && !card) card = t.device();
    });
  }
  if (!card) card = asked && asked->has_index() ? *asked : at::Device(at::kPrivateUse1, fake_npu_current());
  for (size_t i = 0; i < arguments.size(); i++) {
    for_each_tensor(values[i], [&](const at::Tensor& t) {
      if (!t.defined()) return;
      bool number = t.is_cpu() && t.dim() == 0;                          // mixes freely, as everywhere in torch
      bool index = t.is_cpu() && values[i].isOptionalTensorList();  // tensor[cpu_indices] is legal
      TORCH_CHECK(number || index || t.device() == *card, "Expected all tensors to be on the same device, but got ",
                  arguments[i].name(), " is on ", t.device(), ", different from other tensors on ", *card,
                  " (when checking argument in method wrapper_NPU__", name, ")");
      TORCH_CHECK(t.is_cpu() || t.scalar_type() != at::kDouble, "fake NPU: ", name, " on float64, which no card computes");
      TORCH_CHECK(t.is_cpu() || t.scalar_type() != at::kBFloat16 || !fake_npu_is_first_generation(), "fake NPU: ", name,
                  " on bfloat16, which the first generation does not have");
    });
  }
  return *card;
}

// --- what a card does otherwise than a CPU
// Matrix units take float16 and add up in float32. (They are also much faster so than in float16 on a CPU.)
const std::set<std::string> matrix_operators = {"convolution", "convolution_overrideable", "convolution_backward",
                                                "convolution_backward_overrideable", "addmm", "mm", "bmm", "baddbmm"};

// The first generation has no inf: it writes the largest number and sets a flag.
void saturate(const std::string& name, const at::Tensor& t) {
  static const std::set<std::string> constants = {"fill_", "full", "zero_", "scalar_tensor"};
  if (!fake_npu_is_first_generation() || !t.defined() || !t.is_floating_point() || constants.count(name)) return;
  if (at::isfinite(t).all().item<bool>()) return;
  fake_npu_set_overflow(1);
  at::nan_to_num_(const_cast<at::Tensor&>(t), 0.0);
}

// FAKE_NPU_OVERFLOW=RANK:N: the weight gradient of the N-th convolution that rank RANK goes back through overflows.
void inject_overflow(const std::string& name, long call, const at::Tensor& weight_gradient) {
  int rank = 0;
  long at_call = 0;
  const char* fault = std::getenv("FAKE_NPU_OVERFLOW");
  if (!fault || name != "convolution_backward" || std::sscanf(fault, "%d:%ld", &rank, &at_call) != 2) return;
  if (rank == std::atoi(Statistics::rank()) && call == at_call) weight_gradient.view(-1)[0].fill_(INFINITY);
}

// --- the kernel of every replaced operator
void compute(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const Arguments& arguments = schema.arguments();
  const std::string name = schema.name().substr(6);  // without "aten::"
  const size_t base = stack->size() - arguments.size();
  const std::vector<IValue> given(stack->begin() + base, stack->end());
  const at::Device card = find_card(name, arguments, given.data());
  const long call = statistics.count(card.index(), name);
  const bool through_float = matrix_operators.count(name);

  bool has_half = false;
  auto convert = [&](const at::Tensor& t) {
    at::Tensor converted = host(t);
    if (through_float && t.defined() && t.scalar_type() == at::kHalf) {
      has_half = true;
      converted = converted.to(at::kFloat);
    }
    return converted;
  };
  for (size_t i = 0; i < arguments.size(); i++) {
    IValue& value = (*stack)[base + i];
    if (value.isTensor() && is_out(arguments[i])) {
      const at::Tensor& out = given[i].toTensor();
      value = at::empty({0}, out.options().device(at::kCPU));  // the kernel gives it its size
    } else if (value.isTensor()) {
      value = convert(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(convert(t));
      value = std::move(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& t : value.toOptionalTensorVector())
        list.push_back(t ? std::optional<at::Tensor>(convert(*t)) : std::nullopt);
      value = std::move(list);
    } else if (value.isDevice()) {
      value = at::Device(at::kCPU);
    } else if (value.isGenerator()) {
      value = IValue();
    }
  }
  std::vector<at::Tensor> outs(arguments.size());
  for (size_t i = 0; i < arguments.size(); i++)
    if (given[i].isTensor() && is_out(arguments[i])) outs[i] = (*stack)[base + i].toTensor();

  op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), stack);

  for (size_t i = 0; i < arguments.size(); i++) {
    if (!is_written(arguments[i])) continue;
    if (outs[i].defined()) {
      const at::Tensor& out = given[i].toTensor();
      out.resize_(outs[i].sizes());
      host(out).copy_(outs[i]);
    }
    for_each_tensor(given[i], [&](const at::Tensor& t) { saturate(name, host(t)); });
  }
  const auto& returns = schema.returns();
  const size_t first = stack->size() - returns.size();
  auto result = [&](const at::Tensor& t, size_t i) {
    if (!t.defined()) return t;
    at::Tensor rounded = has_half && t.scalar_type() == at::kFloat ? t.to(at::kHalf) : t;
    if (i == 1) inject_overflow(name, call, rounded);
    saturate(name, rounded);
    return to_card(rounded, card);
  };
  for (size_t i = 0; i < returns.size(); i++) {
    IValue& value = (*stack)[first + i];
    if (is_written(returns[i])) {
      for (size_t j = 0; j < arguments.size(); j++)
        if (is_written(arguments[j]) && arguments[j].alias_info()->beforeSets() == returns[i].alias_info()->beforeSets())
          value = given[j];
    } else if (value.isTensor()) {
      value = result(value.toTensor(), i);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(result(t, i));
      value = std::move(list);
    }
  }
}

at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool) {
  statistics.count_copy(to, from);
  if (to.numel()) host(to).copy_(host(from));
  return to;
}

at::Tensor copy_of(const at::Tensor& from, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!format || *format == at::MemoryFormat::Preserve || *format == at::MemoryFormat::Contiguous,
              "Only contiguous_format or preserve_format is supported.");
  bool keep = format.value_or(at::MemoryFormat::Preserve) == at::MemoryFormat::Preserve && from.is_non_overlapping_and_dense();
  at::Tensor to = keep ? at::empty_strided(from.sizes(), from.strides(), from.options()) : at::empty(from.sizes(), from.options());
  return copy_(to, from, false);
}

at::Tensor contiguous(const at::Tensor& t, at::MemoryFormat format) {
  TORCH_CHECK(format == at::MemoryFormat::Contiguous, "NPU contiguous operator only supported contiguous memory format.");
  return t.is_contiguous() ? t : copy_of(t, format);
}

// All memory is in plain order here: no private formats.
at::Tensor as_it_is(const at::Tensor& t, int64_t, std::optional<int64_t>, std::optional<int64_t>) { return t; }

// As the first generation's: the flag of this card, not the gradients, says whether one overflowed, and is cleared then.
void check_flag_and_unscale_(at::TensorList gradients, at::Tensor& found, const at::Tensor& inverse_scale) {
  if (fake_npu_overflow()) {
    fake_npu_set_overflow(0);
    found.add_(1);
    return;
  }
  for (at::Tensor gradient : gradients) gradient.mul_(inverse_scale);
}

// Some sixty operators have an autograd kernel of torch_npu, which may call the NPU's function past the dispatcher:
// torch's own takes their place.
void stock(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  bool composite = op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd);
  op.callBoxedForDispatchKey(composite ? DispatchKey::CompositeImplicitAutograd : DispatchKey::Autograd, *stack);
}

// torch_npu's own, which handle memory and never compute.
const std::set<std::string> kept = {
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_to_copy", "resize_", "resize_as_", "set_",
    "copy_", "clone", "contiguous", "_copy_from", "_copy_from_and_resize", "_local_scalar_dense", "item", "is_pinned",
    "_pin_memory", "pin_memory", "record_stream", "is_set_to", "lift_fresh", "_has_compatible_shallow_copy_type"};

bool is_view(const c10::FunctionSchema& schema) {
  for (const auto& value : schema.returns())
    if (value.alias_info() && !value.alias_info()->isWrite()) return true;
  return false;
}
}  // namespace

// Called when Python ends: destructors do not run after os._exit.
extern "C" void write_statistics() { statistics.write(); }

// Called once, after torch_npu is imported: returns how many operators were replaced.
extern "C" int install() {
  static torch::Library npu(torch::Library::IMPL, "aten", DispatchKey::PrivateUse1, __FILE__, __LINE__);
  static torch::Library autograd(torch::Library::IMPL, "aten", DispatchKey::AutogradPrivateUse1, __FILE__, __LINE__);
  int replaced = 0;
  for (const c10::OperatorName& operator_name : c10::Dispatcher::singleton().getAllOpNames()) {
    auto op = c10::Dispatcher::singleton().findSchema(operator_name);
    if (!op || operator_name.name.rfind("aten::", 0) != 0) continue;
    const std::string base = operator_name.name.substr(6);
    const std::string full = operator_name.overload_name.empty() ? base : base + "." + operator_name.overload_name;
    if (kept.count(base) || is_view(op->schema())) continue;
    if (op->hasKernelForDispatchKey(DispatchKey::AutogradPrivateUse1) &&
        (op->hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd) || op->hasKernelForDispatchKey(DispatchKey::Autograd)))
      autograd.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&stock>());
    if (op->hasKernelForDispatchKey(DispatchKey::PrivateUse1)) {
      npu.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&compute>());
      replaced++;
    }
  }
  npu.impl("copy_", TORCH_FN(copy_));
  npu.impl("clone", TORCH_FN(copy_of));
  npu.impl("contiguous", TORCH_FN(contiguous));
  static torch::Library formats(torch::Library::IMPL, "npu", DispatchKey::PrivateUse1, __FILE__, __LINE__);
  formats.impl("npu_format_cast", TORCH_FN(as_it_is));
  if (fake_npu_is_first_generation())
    npu.impl("_amp_foreach_non_finite_check_and_unscale_", TORCH_FN(check_flag_and_unscale_));
  return replaced;
}
