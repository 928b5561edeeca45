// The door to the CUDA kernels: params and a stream in, void out. float16 and bfloat16, each in a file of its own.
// They throw std::invalid_argument where a call is outside of what they can do, and std::runtime_error with CUDA's
// words.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "../params.h"

namespace fastvit::cuda {

void attention_forward_fp16(const AttentionParams& p, void* stream);
void attention_forward_bf16(const AttentionParams& p, void* stream);

// Memory on the device for as many floats, valid until the kernels of this call have run.
using Scratch = std::function<float*(int64_t)>;

void attention_backward_fp16(const AttentionBackwardParams& p, const Scratch& scratch, void* stream);
void attention_backward_bf16(const AttentionBackwardParams& p, const Scratch& scratch, void* stream);

void patch_embed_forward_fp16(const PatchEmbedParams& p, void* stream);
void patch_embed_forward_bf16(const PatchEmbedParams& p, void* stream);

// Writes the gradients to p.weight and, unless it is nullptr, p.bias; tokens holds that of the output. scratch is for
// so many floats as the first of these says for the current device.
int64_t patch_embed_backward_weight_scratch(const PatchEmbedParams& p);
void patch_embed_backward_weight_fp16(const PatchEmbedParams& p, void* scratch, void* stream);
void patch_embed_backward_weight_bf16(const PatchEmbedParams& p, void* scratch, void* stream);

// Writes the gradient to p.images; tokens holds that of the output.
void patch_embed_backward_images_fp16(const PatchEmbedParams& p, void* stream);
void patch_embed_backward_images_bf16(const PatchEmbedParams& p, void* stream);

// The form for sm_90a, and why it cannot take a call on the current device: empty if it can.
std::string attention_forward_sm90_why_not(const AttentionParams& p);
void attention_forward_sm90_fp16(const AttentionParams& p, void* stream);
void attention_forward_sm90_bf16(const AttentionParams& p, void* stream);

}  // namespace fastvit::cuda
