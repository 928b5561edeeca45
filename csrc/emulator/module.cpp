// fastvit._emulator: importing it registers torch.ops.fastvit_emulated; its functions steer and observe the emulator.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include "emulator.h"

namespace py = pybind11;
using fastvit::emulator::settings;
using fastvit::emulator::statistics;

PYBIND11_MODULE(_emulator, m) {
  m.doc() = "The CUDA kernels of fastvit, run on the CPU; for tests only.";
  m.def(
      "configure",
      [](int multiprocessors, int shared_bytes, int compute_capability, uint64_t seed, bool only_notes) {
        settings() = {multiprocessors, shared_bytes, compute_capability, seed, only_notes};
      },
      py::kw_only(), py::arg("multiprocessors") = 3, py::arg("shared_bytes") = 227 * 1024,
      py::arg("compute_capability") = 90, py::arg("seed") = 0, py::arg("only_notes") = false,
      "Set the device that is emulated, the order of its warps (0: in order), and whether launches are only noted.");
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
          Dl_info info{};
          dladdr(launch.kernel, &info);
          list.append(
              py::make_tuple(info.dli_sname ? info.dli_sname : "", launch.blocks, launch.threads, launch.shared_bytes));
        }
        return list;
      },
      "Return (mangled name, blocks, threads, bytes of shared memory) of each launch since the last reset.");
}
