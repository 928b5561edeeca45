// The entries of the kernel table for attention forward: each input type, in the best form that this instruction set
// has.
#pragma once

#include "attention_forward.h"
#include "attention_forward_tiles.h"

namespace fastvit::cpu::FASTVIT_CAPABILITY {

template <class In>
struct AttentionForwardForm {
  using type = AttentionForward<In>;
};
#if defined(__AMX_BF16__)
template <>
struct AttentionForwardForm<float> {
  using type = AttentionForwardTiles<float>;
};
template <>
struct AttentionForwardForm<Half> {
  using type = AttentionForwardTiles<Half>;
};
template <>
struct AttentionForwardForm<BFloat16> {
  using type = AttentionForwardTiles<BFloat16>;
};
#endif

inline int64_t attention_forward_tasks(const AttentionParams& p) {
  int64_t blocks = 0;
  dispatch_dtype(p.dtype, [&](auto tag) {
    using In = typename decltype(tag)::type;
    blocks = AttentionForwardForm<In>::type::blocks_per_head(p);
  });
  return p.batch * p.num_heads * blocks;
}

inline int64_t attention_forward_scratch(const AttentionParams& p) {
  int64_t bytes = 0;
  dispatch_dtype(p.dtype, [&](auto tag) {
    using In = typename decltype(tag)::type;
    bytes = typename AttentionForwardForm<In>::type(p).scratch_bytes();
  });
  return bytes;
}

inline void attention_forward(const AttentionParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using In = typename decltype(tag)::type;
    typename AttentionForwardForm<In>::type op(p);
    op.run(begin, end);
  });
}

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY
