// A layer's call from VQLinear.forward to the kernel and back, and that of the operator behind torch.compile.  Each line of Python that it
// saves costs as much as a small layer's kernel takes for a thousand weights, and ten times that behind a large layer, whose weights have
// pushed the interpreter out of the caches.
#include <cstdlib>
#include <unordered_map>

#include "bind.h"
#include "cpu/linear.h"
#include "dlpack.h"

namespace py = pybind11;

namespace gptvq {
namespace {

constexpr int kMostDimensions = 8;

// What is asked of PyTorch on each call; set once, never freed.
struct Torch {
  const dlpack::Exchange* exchange = nullptr;
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  PyObject *modes = nullptr, *tracing = nullptr, *level = nullptr, *forward_ad = nullptr, *grad_enabled = nullptr, *threads = nullptr;
  PyObject *current_level = nullptr, *version = nullptr, *requires_grad = nullptr, *new_empty = nullptr, *bias = nullptr;
} torch;

// Borrows the names, as all objects below are borrowed, from what Python holds as long: so the garbage collector sees them.
struct Kernel {
  const Linear* linear;
  std::array<PyObject*, 3> activations;                     // names, by Activations
  std::int64_t most_tokens;
};

// A layer as it was when its kernel was prepared.
struct Call : Kernel {
  std::vector<std::pair<PyObject*, PyObject*>> buffers;     // name, tensor
  PyObject* bias;                                           // tensor or None
  std::uintptr_t bias_data;
  std::vector<std::pair<PyObject*, long>> counted;          // tensor, its changes in place
};

// One of the operator's tensors as it was when a kernel was prepared from it.
struct Seen {
  std::uintptr_t data = 0;                                  // 0: None
  std::uint64_t geometry = 0;                               // type, shape and strides
  long count = -1;                                          // of changes in place; -1: not counted
};

// idx, cb, gs, sc, table and bias, whose memory Python keeps as long: what lies there, unchanged and of the same geometry, is what the kernel
// knows, whoever holds it.
constexpr std::size_t kTensors = 6;
struct Known : Kernel {
  PyObject *owner, *idx, *key;                              // owner: of `linear`; key: of its spec
  std::array<Seen, kTensors> seen;
};

// By idx.  Entries are Python's, and leave when it lets them go, which may be after static objects have gone.
std::unordered_map<PyObject*, const Known*>& known = *new std::unordered_map<PyObject*, const Known*>;

using Owned = py::object;

Owned take(PyObject* object) { return py::reinterpret_steal<py::object>(object); }

// Whether f() is `value`; false as well where it raised.
bool gives(PyObject* f, PyObject* value) { return take(PyObject_CallNoArgs(f)).ptr() == value; }

bool is_long(const Owned& object, long value) { return object && PyLong_Check(object.ptr()) && PyLong_AsLong(object.ptr()) == value; }

bool no_gradient(PyObject* tensor) { return take(PyObject_GetAttr(tensor, torch.requires_grad)).ptr() == Py_False; }

// Nothing has to see operators on x, as gptvq.backends.watching tells it, and nothing needs gradients.
bool unseen(PyObject* x, PyObject* bias) {
  if (Py_TYPE(x) != torch.tensor && Py_TYPE(x) != torch.parameter) return false;
  if (!is_long(take(PyObject_CallNoArgs(torch.modes)), 0) || !gives(torch.tracing, Py_None) || !gives(torch.level, Py_None)) return false;
  if (!is_long(take(PyObject_GetAttr(torch.forward_ad, torch.current_level)), -1)) return false;
  return gives(torch.grad_enabled, Py_False) || (no_gradient(x) && (bias == Py_None || no_gradient(bias)));
}

// The address of a CPU tensor's first element, and the rest of it in `view`; null, and perhaps a Python error, where it has none.
char* address(PyObject* tensor, dlpack::Tensor& view) {
  if (!PyObject_TypeCheck(tensor, torch.tensor) || torch.exchange->view(tensor, &view) || view.device.type != dlpack::cpu || !view.data) return nullptr;
  return static_cast<char*>(view.data) + view.byte_offset;
}

bool unchanged(const Call& call, PyObject* buffers, PyObject* parameters) {
  for (const auto& [name, tensor] : call.buffers)
    if (PyDict_GetItemWithError(buffers, name) != tensor) return false;
  if (PyDict_GetItemWithError(parameters, torch.bias) != call.bias) return false;
  dlpack::Tensor view;
  if (call.bias != Py_None && reinterpret_cast<std::uintptr_t>(address(call.bias, view)) != call.bias_data) return false;
  for (const auto& [tensor, count] : call.counted)
    if (!is_long(take(PyObject_GetAttr(tensor, torch.version)), count)) return false;
  return true;
}

int float_code(const dlpack::DataType& type) {
  if (type.lanes != 1) return -1;
  if (type.code == dlpack::bfloat && type.bits == 16) return static_cast<int>(OutType::bfloat16);
  if (type.code != dlpack::floating) return -1;
  return type.bits == 32 ? static_cast<int>(OutType::float32) : type.bits == 16 ? static_cast<int>(OutType::float16) : -1;
}

bool contiguous(const dlpack::Tensor& t) {
  std::int64_t stride = 1;
  for (int i = t.ndim - 1; t.strides && i >= 0; stride *= t.shape[i--])
    if (t.shape[i] != 1 && t.strides[i] != stride) return false;
  return true;
}

std::uint64_t geometry(const dlpack::Tensor& view) {
  std::uint64_t hash = view.dtype.code | view.dtype.bits << 8 | view.dtype.lanes << 16 | static_cast<std::uint64_t>(view.ndim) << 32;
  for (int i = 0; i < view.ndim; ++i)
    for (const std::int64_t n : {view.shape[i], view.strides ? view.strides[i] : 0})
      hash = (hash ^ static_cast<std::uint64_t>(n)) * 0x9e3779b97f4a7c15u, hash ^= hash >> 29;
  return hash;
}

bool unchanged(const Known& entry, PyObject* const* tensors) {
  for (std::size_t i = 0; i < kTensors; ++i) {
    const Seen& seen = entry.seen[i];
    if ((seen.data == 0) != (tensors[i] == Py_None)) return false;
    if (seen.data == 0) continue;
    dlpack::Tensor view;
    if (reinterpret_cast<std::uintptr_t>(address(tensors[i], view)) != seen.data || geometry(view) != seen.geometry) return false;
    if (seen.count >= 0 && !is_long(take(PyObject_GetAttr(tensors[i], torch.version)), seen.count)) return false;
  }
  return true;
}

int activations_code(const Kernel& kernel, PyObject* name) {
  for (int i = 0; i < 3; ++i)
    if (kernel.activations[i] == name) return i;
  for (int i = 0; PyUnicode_Check(name) && i < 3; ++i)      // from a file, say
    if (PyUnicode_Compare(kernel.activations[i], name) == 0) return i;
  return -1;
}

Owned empty_like(PyObject* x, const dlpack::Tensor& view, std::int64_t rows) {
  std::array<Owned, kMostDimensions> sizes;
  std::array<PyObject*, kMostDimensions + 1> arguments{x};
  for (int i = 0; i < view.ndim; ++i) {
    sizes[i] = take(PyLong_FromLongLong(i + 1 < view.ndim ? view.shape[i] : rows));
    if (!(arguments[i + 1] = sizes[i].ptr())) return {};
  }
  return take(PyObject_VectorcallMethod(torch.new_empty, arguments.data(), static_cast<std::size_t>(view.ndim) + 1, nullptr));
}

// y, or null where x is not for here.  A Python error may be set then.
Owned compute(const Kernel& kernel, PyObject* x, PyObject* activations) {
  const Spec& spec = kernel.linear->spec();
  const int mode = activations_code(kernel, activations);
  dlpack::Tensor view, out;
  const char* from = address(x, view);
  if (mode < 0 || !from || view.ndim < 1 || view.ndim > kMostDimensions || view.shape[view.ndim - 1] != spec.cols || !contiguous(view)) return {};
  const int type = float_code(view.dtype);
  std::int64_t tokens = 1;
  for (int i = 0; i + 1 < view.ndim; ++i) tokens *= view.shape[i];
  if (type < 0 || tokens < 1 || tokens > kernel.most_tokens) return {};
  const Owned count = take(PyObject_CallNoArgs(torch.threads));
  const long threads = count ? PyLong_AsLong(count.ptr()) : -1;
  if (threads < 1) return {};
  Owned y = empty_like(x, view, spec.rows);
  char* to = y ? address(y.ptr(), out) : nullptr;
  if (!to) return {};
  without_gil([&] {
    linear({kernel.linear}, from, static_cast<OutType>(type), tokens, {to}, static_cast<Activations>(mode), static_cast<int>(threads));
  });
  return y;
}

constexpr const char* kCapsule = "gptvq.Call";

// f(), or None where it gives null or fails: the way by Python tells what is wrong, if anything.
template <class F>
PyObject* or_none(F&& f) {
  try {
    if (Owned y = f()) return y.release().ptr();
  } catch (const std::exception&) {
  }
  if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) return nullptr;      // Ctrl-C in a mode of functions
  PyErr_Clear();
  Py_RETURN_NONE;
}

PyObject* run(PyObject* held, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4 || !PyDict_Check(arguments[2]) || !PyDict_Check(arguments[3])) {
    PyErr_SetString(PyExc_TypeError, "need x, activations, buffers and parameters");
    return nullptr;
  }
  const auto* call = static_cast<const Call*>(PyCapsule_GetPointer(PyTuple_GET_ITEM(held, 0), kCapsule));
  if (!call) return nullptr;
  return or_none([&] {
    return unseen(arguments[0], call->bias) && unchanged(*call, arguments[2], arguments[3]) ? compute(*call, arguments[0], arguments[1]) : Owned();
  });
}

// Below PyTorch's dispatcher, where nothing has to see operators any more.
PyObject* recall(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 9 || !PyUnicode_Check(arguments[7])) {
    PyErr_SetString(PyExc_TypeError, "need x, idx, cb, gs, sc, table, bias, the spec's key and activations");
    return nullptr;
  }
  return or_none([&]() -> Owned {
    const auto found = known.find(arguments[1]);
    if (found == known.end() || std::getenv("GPTVQ_BACKEND")) return {};
    const Known entry = *found->second;
    const Owned owner = py::reinterpret_borrow<py::object>(entry.owner);        // other threads may let it go meanwhile
    if (PyUnicode_Compare(entry.key, arguments[7]) != 0 || !unchanged(entry, arguments + 1)) return {};
    return compute(entry, arguments[0], arguments[8]);
  });
}

PyMethodDef method{"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&run)), METH_FASTCALL,
                   "call(x, activations, buffers, parameters) -> y, or None where the way by Python is to be taken"};
PyMethodDef recalling{"recall", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&recall)), METH_FASTCALL,
                      "recall(x, idx, cb, gs, sc, table, bias, key, activations) -> y, or None where the way by Python is to be taken"};

void set_torch(py::object type, const py::object& parameter, const py::object& modes, const py::object& tracing, const py::object& level,
               const py::object& forward_ad, const py::object& grad_enabled, const py::object& threads) {
  const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
  const auto* exchange = capsule.is_none() ? nullptr : static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  PyErr_Clear();
  if (!exchange || exchange->major != dlpack::Exchange::known_major || !exchange->view) return;
  const auto keep = [](const py::object& object) { return py::object(object).release().ptr(); };
  torch.tensor = reinterpret_cast<PyTypeObject*>(keep(type));
  torch.parameter = reinterpret_cast<PyTypeObject*>(keep(parameter));
  torch.modes = keep(modes);
  torch.tracing = keep(tracing);
  torch.level = keep(level);
  torch.forward_ad = keep(forward_ad);
  torch.grad_enabled = keep(grad_enabled);
  torch.threads = keep(threads);
  torch.current_level = PyUnicode_InternFromString("_current_level");
  torch.version = PyUnicode_InternFromString("_version");
  torch.requires_grad = PyUnicode_InternFromString("requires_grad");
  torch.new_empty = PyUnicode_InternFromString("new_empty");
  torch.bias = PyUnicode_InternFromString("bias");
  torch.exchange = exchange;
}

py::object caller(const Linear& linear, const py::object& owner, const py::dict& buffers, const py::object& bias, std::uintptr_t bias_data,
                  const std::vector<std::pair<py::object, long>>& counted, const std::array<py::object, 3>& activations,
                  std::int64_t most_tokens) {
  if (!torch.exchange) return py::none();
  auto call = std::make_unique<Call>(Call{{&linear, {}, most_tokens}, {}, bias.ptr(), bias_data, {}});
  py::list held;
  held.append(owner);                                       // which keeps `linear` and what it reads
  held.append(bias);
  for (const auto& [name, tensor] : buffers) {
    call->buffers.emplace_back(name.ptr(), tensor.ptr());
    held.append(name);
    held.append(tensor);
  }
  for (const auto& [tensor, count] : counted) {
    call->counted.emplace_back(tensor.ptr(), count);
    held.append(tensor);
  }
  for (std::size_t i = 0; i < activations.size(); ++i) {
    call->activations[i] = activations[i].ptr();
    held.append(activations[i]);
  }
  const Owned capsule = take(PyCapsule_New(call.get(), kCapsule, [](PyObject* self) { delete static_cast<Call*>(PyCapsule_GetPointer(self, kCapsule)); }));
  if (!capsule) throw py::error_already_set();
  call.release();
  held.insert(0, capsule);
  Owned function = take(PyCFunction_New(&method, py::tuple(held).ptr()));
  if (!function) throw py::error_already_set();
  return function;
}

void forget(PyObject* capsule) {
  const auto* entry = static_cast<const Known*>(PyCapsule_GetPointer(capsule, kCapsule));
  if (const auto found = known.find(entry->idx); found != known.end() && found->second == entry) known.erase(found);
  delete entry;
}

py::object remember(const Linear& linear, const py::object& owner, const py::object& idx, const py::str& key,
                    const std::array<py::object, kTensors>& views, const std::array<std::optional<long>, kTensors>& counts,
                    const std::array<py::object, 3>& activations, std::int64_t most_tokens) {
  if (!torch.exchange) return py::none();
  auto entry = std::make_unique<Known>(Known{{&linear, {}, most_tokens}, owner.ptr(), idx.ptr(), key.ptr(), {}});
  for (std::size_t i = 0; i < activations.size(); ++i) entry->activations[i] = activations[i].ptr();
  for (std::size_t i = 0; i < kTensors; ++i) {
    if (views[i].is_none()) continue;
    dlpack::Tensor view;
    const auto data = reinterpret_cast<std::uintptr_t>(address(views[i].ptr(), view));
    if (!data) return PyErr_Clear(), py::none();
    entry->seen[i] = {data, geometry(view), counts[i].value_or(-1)};
  }
  const Owned capsule = take(PyCapsule_New(entry.get(), kCapsule, &forget));
  if (!capsule) throw py::error_already_set();
  const Known* mine = entry.release();
  known[mine->idx] = mine;
  return capsule;
}

}  // namespace

void bind_call(py::module_& m) {
  m.def("set_torch", &set_torch, py::arg("tensor"), py::arg("parameter"), py::arg("modes"), py::arg("tracing"), py::arg("level"),
        py::arg("forward_ad"), py::arg("grad_enabled"), py::arg("threads"), "what `caller` asks of PyTorch");
  m.def("caller", &caller, py::arg("linear"), py::arg("owner"), py::arg("buffers"), py::arg("bias"), py::arg("bias_data"),
        py::arg("counted"), py::arg("activations"), py::arg("most_tokens"),
        "f(x, activations, buffers, parameters) -> y, or None where the way by Python is to be taken; None where this PyTorch hands out no "
        "tensors to C");
  m.def("remember", &remember, py::arg("linear"), py::arg("owner"), py::arg("idx"), py::arg("key"), py::arg("views"), py::arg("counts"),
        py::arg("activations"), py::arg("most_tokens"), "As long as the result lives, `recall` takes calls with this idx on tensors that lie "
        "where these views do, changed in place so often (None: not counted).  None: see `caller`");
  m.attr("recall") = take(PyCFunction_New(&recalling, nullptr));
}

}  // namespace gptvq
