// The entries of the kernel table for attention backward: each input type, in the best form that this instruction set
// has.
#pragma once

#include "attention_backward.h"
#include "attention_backward_tiles.h"

namespace fastvit::cpu::FASTVIT_CAPABILITY {

template <class In>
struct AttentionBackwardForm {
  using type = AttentionBackward<In>;
};
#if defined(__AMX_BF16__)
template <>
struct AttentionBackwardForm<float> {
  using type = AttentionBackwardTiles<float>;
};
template <>
struct AttentionBackwardForm<Half> {
  using type = AttentionBackwardTiles<Half>;
};
template <>
struct AttentionBackwardForm<BFloat16> {
  using type = AttentionBackwardTiles<BFloat16>;
};
#endif

template <class F>
inline void with_attention_backward(const AttentionBackwardParams& p, const F& f) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    typename AttentionBackwardForm<typename decltype(tag)::type>::type op(p);
    f(op);
  });
}

inline AttentionBackwardSizes attention_backward_sizes(const AttentionBackwardParams& p) {
  AttentionBackwardSizes sizes;
  with_attention_backward(p, [&](auto& op) { sizes = {op.scratch_bytes(), op.leaves(), op.partial_bytes()}; });
  return sizes;
}

inline void attention_backward(const AttentionBackwardParams& p, int64_t begin, int64_t end) {
  with_attention_backward(p, [&](auto& op) { op.run(begin, end); });
}

inline void attention_backward_parts(const AttentionBackwardParams& p, const AttentionSplit& split, int64_t begin,
                                     int64_t end) {
  with_attention_backward(p, [&](auto& op) { op.run_parts(split, begin, end); });
}

inline void attention_backward_reduce(const AttentionBackwardParams& p, const AttentionSplit& split, int64_t begin,
                                      int64_t end) {
  with_attention_backward(p, [&](auto& op) { op.reduce(split, begin, end); });
}

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY
