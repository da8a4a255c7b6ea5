// The op neurons::glu_ (its contract: neurons.h) and neurons::flush_: schemas, checks, dispatch to the kernels for CPU, CUDA,
// Meta and autograd, and the facts of the build that Python reads.
#include <Python.h>  // first, as Python asks; missing: install python3-dev (Debian) or python3-devel
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/custom_function.h>  // not torch/extension.h, which takes longer than all else here together
#include <torch/library.h>

#include <optional>
#include <string>

#include "neurons.h"

namespace {

using namespace neurons;
using at::Tensor;
using OptTensor = std::optional<Tensor>;

// The arguments of a call of glu_.
struct Call {
  Tensor& gate;
  const OptTensor& up;
  int64_t act;
  const OptTensor &token_profile, &edit_ptr, &edit_index, &edit_value, &token_group, &count, &sketch, &moments, &pending;
};

// Messages are made of strings: printing to a stream crashes where a toolchain links its own libstdc++ into this library.
std::string text(int64_t x) { return std::to_string(x); }
std::string text(at::IntArrayRef x) {
  std::string all = "[";
  for (size_t d = 0; d < x.size(); ++d) all += (d ? ", " : "") + std::to_string(x[d]);
  return all + "]";
}

void check_table(const Tensor& x, const char* name, const Tensor& gate, at::ScalarType type, at::IntArrayRef shape) {
  TORCH_CHECK(x.device() == gate.device(), name, ": expected on ", gate.device().str(), " like gate, got ", x.device().str());
  TORCH_CHECK(x.scalar_type() == type, name, ": expected dtype ", toString(type), ", got ", toString(x.scalar_type()));
  bool same = x.dim() == static_cast<int64_t>(shape.size());
  for (size_t d = 0; same && d < shape.size(); ++d) same = shape[d] < 0 || x.size(d) == shape[d];
  TORCH_CHECK(same, name, ": expected shape ", text(shape), " (-1: any), got ", text(x.sizes()));
  TORCH_CHECK(x.is_contiguous(), name, ": expected contiguous, got strides ", text(x.strides()));
}

void check_rows(const Tensor& x, const char* name) {
  TORCH_CHECK(x.dim() == 2, name, ": expected 2 dimensions [tokens, d_ff], got shape ", text(x.sizes()));
  TORCH_CHECK(x.size(1) <= 1 || x.stride(1) == 1, name, ": expected last stride 1, got strides ", text(x.strides()));
  TORCH_CHECK(x.size(0) <= 1 || x.stride(0) >= x.size(1), name, ": expected rows that do not overlap, got strides ",
              text(x.strides()), " for shape ", text(x.sizes()));
}

bool all_four(const char* names, const OptTensor& w, const OptTensor& x, const OptTensor& y, const OptTensor& z) {
  const int given = w.has_value() + x.has_value() + y.has_value() + z.has_value();
  TORCH_CHECK(given == 0 || given == 4, names, ": all four or none, got ", text(given));
  return given == 4;
}

// Checks all that can be checked without reading data, and gathers sizes.
Args checked(const Call& c) {
  Args a{};
  const Tensor& gate = c.gate;
  check_rows(gate, "gate");
  const auto type = gate.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
              "gate: expected float32, bfloat16 or float16, got ", toString(type));
  TORCH_CHECK(c.act >= 0 && c.act < kActs, "act: expected 0 (silu), 1 (gelu), 2 (gelu_tanh) or 3 (relu), got ", text(c.act));
  a.tokens = gate.size(0);
  a.width = gate.size(1);
  a.gate_stride = gate.stride(0);
  a.act = static_cast<int>(c.act);
  a.dtype = type == at::kFloat ? kFloat32 : type == at::kBFloat16 ? kBFloat16 : kFloat16;
  constexpr int64_t kMostColumns = (int64_t{1} << 31) / kBins - 1;  // so that an int numbers the bins of a group
  TORCH_CHECK(a.width <= kMostColumns, "gate: at most ", text(kMostColumns), " columns, got ", text(a.width));
  TORCH_CHECK(a.tokens < (int64_t{1} << 30), "gate: at most 2^30 rows, got ", text(a.tokens));
  if (c.up) {
    const Tensor& up = *c.up;
    check_rows(up, "up");
    TORCH_CHECK(up.sizes() == gate.sizes(), "up: expected shape ", text(gate.sizes()), " like gate, got ", text(up.sizes()));
    TORCH_CHECK(up.scalar_type() == type, "up: expected dtype ", toString(type), " like gate, got ", toString(up.scalar_type()));
    TORCH_CHECK(up.device() == gate.device(), "up: expected on ", gate.device().str(), " like gate, got ", up.device().str());
    a.up_stride = up.stride(0);
  }
  if (all_four("token_profile, edit_ptr, edit_index and edit_value", c.token_profile, c.edit_ptr, c.edit_index, c.edit_value)) {
    check_table(*c.token_profile, "token_profile", gate, at::kInt, {a.tokens});
    check_table(*c.edit_ptr, "edit_ptr", gate, at::kInt, {-1, a.tiles() + 1});
    check_table(*c.edit_index, "edit_index", gate, at::kInt, {-1});
    check_table(*c.edit_value, "edit_value", gate, at::kFloat, {c.edit_index->size(0), 4});
    a.profiles = static_cast<int>(c.edit_ptr->size(0));
    a.capacity = static_cast<int>(c.edit_index->size(0));
  }
  if (all_four("token_group, count, sketch and moments", c.token_group, c.count, c.sketch, c.moments)) {
    check_table(*c.token_group, "token_group", gate, at::kInt, {a.tokens});
    check_table(*c.count, "count", gate, at::kInt, {-1, a.width});
    a.groups = static_cast<int>(c.count->size(0));
    check_table(*c.sketch, "sketch", gate, at::kInt, {a.groups, a.width, kBins});
    check_table(*c.moments, "moments", gate, at::kDouble, {a.groups, 2, a.width});
  }
  if (c.pending) {
    TORCH_CHECK(c.count, "pending: expected with count, sketch and moments, got it alone");
    TORCH_CHECK(!gate.is_cuda(), "pending: expected none on a GPU, which counts at once");  // and one ring at least elsewhere:
    check_table(*c.pending, "pending", gate, at::kByte, {c.pending->numel() ? -1 : 1, a.tiles(), sizeof(Pending)});
  }
  return a;
}

// Byte ranges may interleave (the halves of a fused gate_up do), so compare within the rows of their common stride.
void check_overlap(const Tensor& gate, const Tensor& up) {
  const int64_t size = gate.element_size();
  const auto g = reinterpret_cast<intptr_t>(gate.data_ptr()), u = reinterpret_cast<intptr_t>(up.data_ptr());
  const auto end = [&](intptr_t begin, const Tensor& x) { return begin + ((x.size(0) - 1) * x.stride(0) + x.size(1)) * size; };
  if (gate.numel() == 0 || g >= end(u, up) || u >= end(g, gate)) return;
  const int64_t row = gate.stride(0) * size, columns = gate.size(1) * size;
  const int64_t apart = row > 0 ? (((u - g) % row) + row) % row : 0;
  TORCH_CHECK(gate.stride(0) == up.stride(0) && apart >= columns && row - apart >= columns,
              "gate and up: expected separate memory, got overlapping tensors of strides ", text(gate.strides()), " and ",
              text(up.strides()));
}

void add_pending(Args& a, const Tensor& pending) {
  TORCH_CHECK(reinterpret_cast<uintptr_t>(pending.data_ptr()) % alignof(Pending) == 0,
              "pending: expected memory aligned to ", text(alignof(Pending)), " bytes");
  a.pending = static_cast<Pending*>(pending.data_ptr());
  a.rings = static_cast<int>(pending.size(0));
}

Args with_pointers(const Call& c) {
  Args a = checked(c);
  if (c.up) check_overlap(c.gate, *c.up);
  a.gate = c.gate.data_ptr();
  a.up = c.up ? c.up->data_ptr() : nullptr;
  if (c.token_profile) {
    a.token_profile = c.token_profile->const_data_ptr<int32_t>();
    a.edit_ptr = c.edit_ptr->const_data_ptr<int32_t>();
    a.edit_index = c.edit_index->const_data_ptr<int32_t>();
    a.edit_value = reinterpret_cast<const Edit*>(c.edit_value->const_data_ptr<float>());
    TORCH_CHECK(reinterpret_cast<uintptr_t>(a.edit_value) % sizeof(Edit) == 0, "edit_value: expected memory aligned to 16 bytes");
  }
  if (c.token_group) {
    a.token_group = c.token_group->const_data_ptr<int32_t>();
    a.count = c.count->data_ptr<int32_t>();
    a.sketch = c.sketch->data_ptr<int32_t>();
    a.moments = c.moments->data_ptr<double>();
    if (c.pending) add_pending(a, *c.pending);
  }
  return a;
}

void glu_on_cpu(const Call& c) { glu_cpu(with_pointers(c)); }

void flush_on_cpu(Tensor& count, Tensor& sketch, Tensor& pending) {
  TORCH_CHECK(sketch.dim() == 3, "sketch: expected 3 dimensions [groups, d_ff, bins], got shape ", text(sketch.sizes()));
  Args a{};
  a.groups = static_cast<int>(sketch.size(0));
  a.width = sketch.size(1);
  check_table(sketch, "sketch", pending, at::kInt, {a.groups, a.width, kBins});
  check_table(count, "count", pending, at::kInt, {a.groups, a.width});
  check_table(pending, "pending", sketch, at::kByte, {pending.numel() ? -1 : 1, a.tiles(), sizeof(Pending)});
  add_pending(a, pending);
  a.count = count.data_ptr<int32_t>();
  a.sketch = sketch.data_ptr<int32_t>();
  flush_cpu(a);
}

void glu_on_meta(const Call& c) {
  // With symbolic sizes there is nothing to compare yet: the real kernel checks them when it runs.
  for (const OptTensor& x : {OptTensor(c.gate), c.up, c.token_profile, c.token_group})
    if (x && x->unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return;
  checked(c);
}

// What the dispatcher calls, with each argument by itself.
template <void (*Run)(const Call&)>
void glu(Tensor& gate, const OptTensor& up, int64_t act, const OptTensor& token_profile, const OptTensor& edit_ptr,
         const OptTensor& edit_index, const OptTensor& edit_value, const OptTensor& token_group, const OptTensor& count,
         const OptTensor& sketch, const OptTensor& moments, const OptTensor& pending) {
  Run({gate, up, act, token_profile, edit_ptr, edit_index, edit_value, token_group, count, sketch, moments, pending});
}

void glu_below_autograd(const Call& c) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("neurons::glu_", "").typed<decltype(glu<glu_on_cpu>)>();
  at::AutoDispatchBelowADInplaceOrView below;
  op.call(c.gate, c.up, c.act, c.token_profile, c.edit_ptr, c.edit_index, c.edit_value, c.token_group, c.count, c.sketch,
          c.moments, c.pending);
}

// Forward works without no_grad; backward raises. torch's own fallback for ops without a derivative marks what they return,
// and this one returns nothing: a backward through it would pass gradients on as if gate had not changed.
struct NoDerivative : torch::autograd::Function<NoDerivative> {
  static Tensor forward(torch::autograd::AutogradContext* context, Tensor gate, const OptTensor& /*up*/, const Call& c) {
    context->mark_dirty({gate});
    glu_below_autograd(c);
    return gate;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, const torch::autograd::variable_list&) {
    TORCH_CHECK(false, "neurons::glu_: the derivative is not implemented");
  }
};

void glu_on_autograd(const Call& c) {
  const bool tangents = c.gate._fw_grad(0).defined() || (c.up && c.up->_fw_grad(0).defined());  // of forward mode
  TORCH_CHECK(!tangents, "neurons::glu_: the derivative is not implemented");
  if (at::GradMode::is_enabled() && (c.gate.requires_grad() || (c.up && c.up->requires_grad())))
    NoDerivative::apply(c.gate, c.up, c);
  else
    glu_below_autograd(c);
}

}  // namespace

TORCH_LIBRARY(neurons, m) {
  m.def("glu_(Tensor(a!) gate, Tensor? up, int act, Tensor? token_profile, Tensor? edit_ptr, Tensor? edit_index, "
        "Tensor? edit_value, Tensor? token_group, Tensor(b!)? count, Tensor(c!)? sketch, Tensor(d!)? moments, "
        "Tensor(e!)? pending=None) -> ()", {at::Tag::pt2_compliant_tag});
  m.def("flush_(Tensor(a!) count, Tensor(b!) sketch, Tensor(c!) pending) -> ()", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(neurons, CPU, m) {
  m.impl("glu_", glu<glu_on_cpu>);
  m.impl("flush_", flush_on_cpu);
}
TORCH_LIBRARY_IMPL(neurons, Meta, m) {
  m.impl("glu_", glu<glu_on_meta>);
  m.impl("flush_", [](Tensor&, Tensor&, Tensor&) {});
}
TORCH_LIBRARY_IMPL(neurons, Autograd, m) { m.impl("glu_", glu<glu_on_autograd>); }

#ifdef NEURONS_CUDA
// Part of libtorch's C interface, declared here because its header wants the CUDA toolkit's.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

static void glu_on_cuda(const Call& c) {
  const Args a = with_pointers(c);
  if (a.tokens == 0 || a.width == 0) return;
  const auto device = c.gate.device();
  const c10::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_CHECK(aoti_torch_get_current_cuda_stream(device.index(), &stream) == 0, "no CUDA stream on ", device.str());
  const char* error = glu_cuda(a, stream);
  TORCH_CHECK(!error, "neurons::glu_ on ", device.str(), ": ", error);
}
TORCH_LIBRARY_IMPL(neurons, CUDA, m) { m.impl("glu_", glu<glu_on_cuda>); }
#else
#define NEURONS_CUDA  // no architectures
#endif

// The extension module: facts of the build, and constants that Python shares with it. (By hand: pybind11 takes long to compile.)
PyMODINIT_FUNC PyInit__neurons() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_neurons", "Build facts of neurons::glu_, and its constants.", -1};
  PyObject *m = PyModule_Create(&definition), *edges = PyList_New(kBins + 1);
  for (int b = 0; edges && b <= kBins; ++b) PyList_SET_ITEM(edges, b, PyFloat_FromDouble(bin_edge(b)));
  PyObject* facts = Py_BuildValue("{s:s, s:s, s:i, s:n, s:i, s:N, s:[ssss], s:O, s:s}",
      "source", C10_STRINGIZE(NEURONS_SOURCE),  // digest of csrc/: a build of other sources is refused
      "cuda", C10_STRINGIZE(NEURONS_CUDA),  // the architectures it was compiled for; "" without CUDA
      "tile", kTile, "pending_bytes", sizeof(Pending), "bins", kBins, "edges", edges,  // pending_bytes: of a tile
      "acts", "silu", "gelu", "gelu_tanh", "relu", "fast_bfloat16", cpu_fast_bfloat16() ? Py_True : Py_False, "vector", cpu_vector());
  if (!m || !facts || PyDict_Update(PyModule_GetDict(m), facts) < 0) Py_CLEAR(m);
  Py_XDECREF(facts);
  return m;
}
