// The entries of the kernel table for patch embedding: each input type, in the best form that this instruction set has.
#pragma once

#include "patch_embed.h"
#include "patch_embed_split.h"
#include "patch_embed_tiles.h"

namespace fastvit::cpu::FASTVIT_CAPABILITY {

template <class In>
struct PatchEmbedForm {
  using type = PatchEmbed<In>;
};
#if defined(__AMX_BF16__)
template <>
struct PatchEmbedForm<BFloat16> {
  using type = PatchEmbedTiles;
};
template <>
struct PatchEmbedForm<float> {
  using type = PatchEmbedSplit<float>;
};
template <>
struct PatchEmbedForm<Half> {
  using type = PatchEmbedSplit<Half>;
};
#endif

#define FASTVIT_PATCH_EMBED_KERNEL(name, task_count)                                                                  \
  inline int64_t patch_embed_##name##_tasks(const PatchEmbedParams& p) {                                              \
    int64_t tasks = 0;                                                                                                \
    dispatch_dtype(p.dtype, [&](auto tag) {                                                                           \
      typename PatchEmbedForm<typename decltype(tag)::type>::type op(p);                                              \
      tasks = task_count;                                                                                             \
    });                                                                                                               \
    return tasks;                                                                                                     \
  }                                                                                                                   \
  inline void patch_embed_##name(const PatchEmbedParams& p, int64_t begin, int64_t end) {                             \
    dispatch_dtype(                                                                                                   \
        p.dtype, [&](auto tag) { typename PatchEmbedForm<typename decltype(tag)::type>::type(p).name(begin, end); }); \
  }

FASTVIT_PATCH_EMBED_KERNEL(forward, op.forward_tokens().count* op.forward_rows().count)
FASTVIT_PATCH_EMBED_KERNEL(backward_weight, op.gradient_columns().count* op.gradient_rows().count)
FASTVIT_PATCH_EMBED_KERNEL(backward_images, op.columns().count* op.token_steps().count)
#undef FASTVIT_PATCH_EMBED_KERNEL

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY
