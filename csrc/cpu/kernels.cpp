// The kernels for one instruction set: setup.py compiles this file once for each, with its flags and its name in
// FASTVIT_CAPABILITY.
#include "kernels.h"

#include "attention_backward_kernels.h"
#include "attention_forward_kernels.h"
#include "fma_peak.h"
#include "patch_embed_kernels.h"

#define FASTVIT_STRING_OF(name) #name
#define FASTVIT_STRING(name) FASTVIT_STRING_OF(name)

namespace fastvit::cpu::FASTVIT_CAPABILITY {

extern const KernelTable kTable;
const KernelTable kTable = {
    FASTVIT_STRING(FASTVIT_CAPABILITY),
    attention_forward_tasks,
    attention_forward,
    attention_forward_scratch,
    attention_backward_sizes,
    attention_backward,
    attention_backward_parts,
    attention_backward_reduce,
    patch_embed_forward_tasks,
    patch_embed_forward,
    patch_embed_backward_weight_tasks,
    patch_embed_backward_weight,
    patch_embed_backward_images_tasks,
    patch_embed_backward_images,
    fma_steps,
};

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY
