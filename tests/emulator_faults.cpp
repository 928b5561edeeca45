// Runs the kernels for sm_80 with no fault, then with each of those that tests/planted.py has put into a copy of their
// sources, and prints a line for each: what the emulator says, or how far the results are from those without a fault.
// The sources ask `fault` which one is on. FAULTS: their number; those from FIRST_PATCH_EMBED on are patch embedding's.
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <vector>

int fault;
#include "cuda/attention_backward.cuh"
#include "cuda/attention_forward.cuh"
#include "cuda/patch_embed_backward.cuh"
#include "cuda/patch_embed_forward.cuh"

namespace fastvit::cuda {

std::string attention_forward_sm90_why_not(const AttentionParams&) { return "not here"; }

namespace {

using emulator::Range;
using Results = std::vector<double>;

// 16-bit elements; NaN until they are written.
struct Elements : std::vector<uint16_t> {
  explicit Elements(int64_t count) : std::vector<uint16_t>(size_t(count), 0xFFFF) {}

  Elements& fill(uint32_t seed) {
    std::mt19937 random(seed);
    for (uint16_t& x : *this) x = round_to<Half>((int(random() % 2001) - 1000) / 500.0f);
    return *this;
  }

  Range range(const char* name, bool writable = false) { return {name, data(), int64_t(size()) * 2, writable}; }
  void append_to(Results& results) const {
    for (uint16_t x : *this) results.push_back(to_float<Half>(x));
  }
};

struct Floats : std::vector<float> {
  explicit Floats(int64_t count) : std::vector<float>(size_t(count), std::nanf("")) {}
  Range range(const char* name, bool writable) { return {name, data(), int64_t(size()) * 4, writable}; }
};

struct AttentionShape {
  int heads, queries, keys, multiprocessors;
  int shared_bytes;
  bool is_causal = false;
  // A key with −inf, which makes NaN of the zeros beyond a sequence where nobody takes them out.
  bool infinite_key = false;
};

// Forward, and backward on its results.
Results attention(const AttentionShape& shape, bool backward) {
  constexpr int kDim = 64;
  const auto [heads, queries, keys, multiprocessors, shared_bytes, is_causal, infinite_key] = shape;
  Elements q(heads * queries * kDim), k(heads * keys * kDim), v(k.size()), o(q.size()), d_o(q.size());
  Elements dq(q.size()), dk(k.size()), dv(k.size());
  Floats lse(heads * queries), d_lse(lse.size()), scratch(2 * heads * round_up(queries, kRowTile));
  q.fill(1), k.fill(2), v.fill(3), d_o.fill(4);
  for (size_t i = 0; i < d_lse.size(); ++i) d_lse[i] = float(i % 7) / 4;
  if (infinite_key) {
    for (uint16_t& x : q) x &= 0x7FFF;
    k[3 * kDim + 5] = round_to<Half>(-infinity());
  }
  AttentionBackwardParams p;
  p.batch = 1, p.num_heads = heads, p.seqlen_q = queries, p.seqlen_k = keys;
  p.head_dim = p.head_dim_v = kDim, p.scale = 0.125, p.is_causal = is_causal;
  const auto view = [](Elements& x, int rows) { return View4{x.data(), 0, rows * kDim, kDim}; };
  p.query = view(q, queries), p.key = view(k, keys), p.value = view(v, keys), p.output = view(o, queries);
  p.lse = lse.data(), p.grad_lse = d_lse.data(), p.grad_output = view(d_o, queries);
  p.grad_query = view(dq, queries), p.grad_key = view(dk, keys), p.grad_value = view(dv, keys);
  emulator::settings().multiprocessors = multiprocessors;
  emulator::settings().shared_bytes = shared_bytes;
  std::vector<Range> inputs = {q.range("query"), k.range("key"), v.range("value")};
  std::vector<Range> memory = inputs;
  memory.insert(memory.end(), {o.range("output", true), lse.range("lse", true)});
  {
    const emulator::GlobalMemory guard(memory);
    attention_forward_dtype<Half>(p, nullptr);
  }
  Results results(lse.begin(), lse.end());
  o.append_to(results);
  if (!backward) return results;
  inputs.insert(inputs.end(), {o.range("output"), lse.range("lse", false), d_lse.range("grad_lse", false),
                               d_o.range("grad_output"), scratch.range("scratch", true), dq.range("grad_query", true),
                               dk.range("grad_key", true), dv.range("grad_value", true)});
  const emulator::GlobalMemory guard(inputs);
  attention_backward_dtype<Half>(p, [&](int64_t) { return scratch.data(); }, nullptr);
  for (const Elements* grad : {&dq, &dk, &dv}) grad->append_to(results);
  return results;
}

struct PatchShape {
  int side, columns, multiprocessors;  // of a patch, of the images in patches
  bool has_bias = true;
};

enum class PatchWork { kForward, kWeight, kImages };

Results patch_embed(const PatchShape& shape, PatchWork work) {
  constexpr int kBatch = 3, kChannels = 3, kRows = 9, kEmbedDim = 136;
  const int height = kRows * shape.side, width = shape.columns * shape.side, tokens = kRows * shape.columns;
  Elements images(kBatch * kChannels * height * width), weight(kEmbedDim * kChannels * shape.side * shape.side);
  Elements bias(kEmbedDim), rows(kBatch * tokens * kEmbedDim);
  if (work != PatchWork::kImages) images.fill(1);
  if (work != PatchWork::kWeight) weight.fill(2), bias.fill(3);
  if (work != PatchWork::kForward) rows.fill(4);
  PatchEmbedParams p;
  p.batch = kBatch, p.in_channels = kChannels, p.rows = kRows, p.columns = shape.columns;
  p.patch_height = p.patch_width = p.patch_row_step = p.patch_column_step = shape.side;
  p.embed_dim = kEmbedDim;
  p.images = images.data(), p.image_stride = kChannels * height * width, p.channel_stride = height * width;
  p.height_stride = width, p.width_stride = 1;
  p.weight = weight.data(), p.bias = shape.has_bias ? bias.data() : nullptr;
  p.tokens = rows.data(), p.token_batch_stride = tokens * kEmbedDim, p.token_stride = kEmbedDim;
  emulator::settings().multiprocessors = shape.multiprocessors;
  emulator::settings().shared_bytes = 99 * 1024;
  Floats scratch(work == PatchWork::kWeight ? weight_scratch(p) : 0);
  const emulator::GlobalMemory guard(
      {images.range("images", work == PatchWork::kImages), weight.range("weight", work == PatchWork::kWeight),
       bias.range("bias", work == PatchWork::kWeight), rows.range("tokens", work == PatchWork::kForward),
       scratch.range("scratch", true)});
  Results results;
  switch (work) {
    case PatchWork::kForward:
      patch_embed_forward_dtype<Half>(p, nullptr);
      rows.append_to(results);
      break;
    case PatchWork::kWeight:
      patch_embed_backward_weight_dtype<Half>(p, scratch.data(), nullptr);
      weight.append_to(results);
      bias.append_to(results);
      break;
    case PatchWork::kImages:
      patch_embed_backward_images_dtype<Half>(p, nullptr);
      images.append_to(results);
  }
  return results;
}

using Calls = std::vector<std::function<Results()>>;

// Shared memory for one block of these shapes on a multiprocessor, not for two.
constexpr int kOneBlock = 60 * 1024;
const Calls kAttention = {
    // Resident, where one block takes all heads: two stages, in one pass; one stage, by steps. Then streaming.
    [] { return attention({3, 70, 70, 1, kOneBlock}, false); },
    [] { return attention({1, 40, 150, 1, 2 * kOneBlock, true}, false); },
    [] { return attention({1, 130, 200, 1, kOneBlock}, false); },
    // Resident with and without a mask, and streaming in three stages.
    [] { return attention({2, 70, 90, 1, kOneBlock}, true); },
    [] { return attention({2, 70, 90, 1, kOneBlock, true, true}, true); },
    [] { return attention({1, 70, 150, 1000, kOneBlock}, true); },
};
const Calls kPatchEmbed = {
    // Slices that end within the patch, elements by chunks; by pairs; and small tiles.
    [] { return patch_embed({8, 11, 1}, PatchWork::kForward); },
    [] { return patch_embed({10, 3, 64}, PatchWork::kForward); },
    [] { return patch_embed({8, 11, 4}, PatchWork::kWeight); },
    [] { return patch_embed({10, 11, 1}, PatchWork::kImages); },
};

// Far from what it should be: by more than the tolerance rule allows float16.
std::string difference(const Results& got, const Results& sound) {
  double largest = 0;
  for (double x : sound) largest = std::isfinite(x) ? std::max(largest, std::abs(x)) : largest;
  for (size_t i = 0; i < got.size(); ++i) {
    const bool same = std::isfinite(sound[i]) ? std::abs(got[i] - sound[i]) < 1e-2 * largest
                                              : got[i] == sound[i] || (std::isnan(got[i]) && std::isnan(sound[i]));
    if (!same) return "wrong";
  }
  return "";
}

std::string look(const Calls& calls, std::vector<Results>& sound) {
  emulator::statistics() = {};
  for (size_t i = 0; i < calls.size(); ++i) {
    try {
      const Results results = calls[i]();
      if (fault == 0) sound.push_back(results);
      const std::string found = difference(results, sound[i]);
      if (!found.empty()) return found;
    } catch (const std::exception& error) {
      return error.what();
    }
  }
  return emulator::statistics().bank_conflicts ? "bank conflicts" : "nothing";
}

}  // namespace
}  // namespace fastvit::cuda

int main() {
  using namespace fastvit::cuda;
  std::vector<Results> attention, patch_embed;
  const std::string first = look(kAttention, attention), second = look(kPatchEmbed, patch_embed);
  std::printf("%s\n", first == "nothing" ? second.c_str() : first.c_str());
  for (fault = 1; fault <= FAULTS; ++fault) {
    const bool is_attention = fault < FIRST_PATCH_EMBED;
    const std::string found = is_attention ? look(kAttention, attention) : look(kPatchEmbed, patch_embed);
    std::printf("%s\n", found.c_str());
  }
}
