// fastvit._C: importing it registers the native ops; its functions describe the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/kernels.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of fastvit; importing this module registers torch.ops.fastvit_native.";
  m.def(
      "cpu_capability", [] { return std::string(fastvit::cpu::kernels().capability); },
      "Return the instruction set in use; raises RuntimeError if FASTVIT_CPU_CAPABILITY names one that cannot be.");
  m.def(
      "cpu_capabilities",
      [] {
        std::vector<std::pair<std::string, bool>> list;
        for (const auto& capability : fastvit::cpu::capabilities()) {
          list.emplace_back(capability.name, capability.why_not.empty());
        }
        return list;
      },
      "Return (name, whether it can run here) of each instruction set in this build, best first.");
  m.def(
      "cpu_capability_why_not",
      [](const std::string& name) {
        for (const auto& capability : fastvit::cpu::capabilities()) {
          if (capability.name == name) return capability.why_not;
        }
        return std::string("not in this build");
      },
      "Return why the instruction set of this name cannot run here; empty if it can.");
  m.def(
      "cuda_architectures", [] { return std::string(FASTVIT_CUDA_ARCHITECTURES); },
      "Return the CUDA architectures in this build, separated by spaces; empty without CUDA kernels.");
  m.def(
      "cuda_compiler", [] { return std::string(FASTVIT_CUDA_COMPILER); },
      "Return nvcc's version, empty without CUDA kernels.");
  m.def("compiler", [] { return std::string(__VERSION__); }, "Return the version of the C++ compiler.");
}
