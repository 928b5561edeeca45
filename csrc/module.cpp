// fastvit._C: importing it registers the native ops; its functions describe the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/kernels.h"
#include "ops/outputs_cpu.h"
#include "ops/probes_cpu.h"

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
  m.def("fma_peak", &fastvit::fma_peak, pybind11::arg("seconds") = 0.1,
        pybind11::call_guard<pybind11::gil_scoped_release>(),
        "Return GFLOP/s of float32 multiply-adds in registers on torch's threads, in the instruction set in use: the "
        "best burst of `seconds`.");
  m.def(
      "attention_scratch", &fastvit::attention_scratch, pybind11::arg("seqlen_q"), pybind11::arg("seqlen_k"),
      pybind11::arg("head_dim"), pybind11::arg("head_dim_v"), pybind11::arg("dtype") = "float32",
      pybind11::arg("bias") = false,
      "Return the scratch of attention on the CPU in bytes, linear in the lengths: [forward per thread, backward per "
      "thread, leaves that a head can be cut into, bytes of a leaf's sums]. At most 8 leaves' sums per thread are held "
      "beside it, and only where heads do not deal out evenly. A thread keeps its scratch until it ends.");
  m.def("held_scratch", &fastvit::held_scratch, "Return the bytes of scratch that the calling thread holds.");
  m.def("poison_outputs", &fastvit::poison_outputs, pybind11::arg("wanted"),
        "Fill the outputs that the ops of fastvit::*.cpu allocate with NaN before the kernel runs: for tests.");
  m.def(
      "cuda_architectures", [] { return std::string(FASTVIT_CUDA_ARCHITECTURES); },
      "Return the CUDA architectures in this build, separated by spaces; empty without CUDA kernels.");
  m.def(
      "cuda_compiler", [] { return std::string(FASTVIT_CUDA_COMPILER); },
      "Return nvcc's version, empty without CUDA kernels.");
  m.def("compiler", [] { return std::string(__VERSION__); }, "Return the version of the C++ compiler.");
}
