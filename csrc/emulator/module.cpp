// fastvit._emulator: importing it registers torch.ops.fastvit_emulated; its functions steer and observe the emulator.
#include <dlfcn.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>

#include "emulator.h"

namespace py = pybind11;
using fastvit::emulator::settings;
using fastvit::emulator::statistics;

namespace {

// The mangled name of a kernel.
std::string name_of(const void* kernel) {
  Dl_info info{};
  dladdr(kernel, &info);
  return info.dli_sname ? info.dli_sname : "";
}

using Occupancy = std::function<int(const std::string& kernel, int threads, int shared_bytes)>;

}  // namespace

PYBIND11_MODULE(_emulator, m) {
  m.doc() = "The CUDA kernels of fastvit, run on the CPU; for tests only.";
  m.def(
      "configure",
      [](int multiprocessors, int shared_bytes, int compute_capability, uint64_t seed, bool only_notes,
         const Occupancy& occupancy) {
        settings() = {multiprocessors, shared_bytes, compute_capability, seed, only_notes, nullptr};
        if (!occupancy) return;
        settings().occupancy = [occupancy](const fastvit::emulator::Launch& launch) {
          return occupancy(name_of(launch.kernel), launch.threads, launch.shared_bytes);
        };
      },
      py::kw_only(), py::arg("multiprocessors") = 3, py::arg("shared_bytes") = 227 * 1024,
      py::arg("compute_capability") = 90, py::arg("seed") = 0, py::arg("only_notes") = false,
      py::arg("occupancy") = py::none(),
      "Set the device that is emulated, the order of its warps (0: in order), whether launches are only noted, and a "
      "function of (mangled name, threads, bytes of shared memory) that says how many blocks share a multiprocessor.");
  m.def("reset_statistics", [] { statistics() = {}; }, "Count from zero again.");
  m.def(
      "statistics",
      [] {
        const auto& s = statistics();
        py::dict d;
        d["launches"] = s.launches.size();
        d["blocks"] = s.blocks;
        d["matrix_products"] = s.matrix_products;
        d["matrix_loads"] = s.matrix_loads;
        d["bank_conflicts"] = s.bank_conflicts;
        d["async_copies"] = s.async_copies;
        d["tensor_loads"] = s.tensor_loads;
        d["warpgroup_products"] = s.warpgroup_products;
        d["largest_shared_bytes"] = s.largest_shared_bytes;
        return d;
      },
      "Return what kernels have done since the last reset.");
  m.def(
      "launches",
      [] {
        py::list list;
        for (const auto& launch : statistics().launches) {
          list.append(py::make_tuple(name_of(launch.kernel), launch.blocks, launch.threads, launch.shared_bytes));
        }
        return list;
      },
      "Return (mangled name, blocks, threads, bytes of shared memory) of each launch since the last reset.");
}
