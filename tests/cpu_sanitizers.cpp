// Runs the CPU kernels without torch, for tests/test_cpu_sanitizers.py: every buffer is a heap block of exactly the
// tensor's extent, so that AddressSanitizer sees one element too far; results are compared with plain loops in double.
//
// Arguments: the name of a fault to plant (empty: none), and anything more for float32 alone. The faults are
// "short-output", "short-key", "short-image", "short-weight" (a buffer without its last row) and "overlap" (two threads
// get the same task). Prints the number of comparisons.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "../csrc/cpu/attention_threads.h"
#include "cpu_tensor.h"

using namespace fastvit;

namespace {

std::string fault;
int64_t compared = 0;

using Value = std::function<double(int64_t, int64_t, int64_t, int64_t)>;

void compare(const char* name, const Tensor& got, const Value& expected) {
  const double tolerance = got.dtype == DType::kFloat64   ? 1e-12
                           : got.dtype == DType::kFloat32 ? 1e-5
                           : got.dtype == DType::kFloat16 ? 2e-3
                                                          : 1.6e-2;
  double worst = 0, largest = 1e-3;
  got.each([&](auto... index) {
    const double wanted = expected(index...), error = std::fabs(got.get(index...) - wanted);
    if (!(error <= worst)) worst = error;
    largest = std::fmax(largest, std::fabs(wanted));
  });
  ++compared;
  if (!(worst <= tolerance * largest)) {
    std::fprintf(stderr, "wrong: %s: error %g, largest value %g\n", name, worst, largest);
    std::exit(3);
  }
}

// Real threads, so that ThreadSanitizer has something to see and each has scratch of its own.
struct Threads {
  static inline size_t widest = 0;  // the most threads that were ever given work
  int64_t count;
  template <class F>
  void operator()(int64_t tasks, const F& f) const {
    std::vector<std::thread> threads;
    const int64_t each = (tasks + count - 1) / count;
    for (int64_t begin = 0; begin < tasks; begin += each) {
      const int64_t from = fault == "overlap" && begin > 0 ? begin - 1 : begin;
      threads.emplace_back([=, &f] { f(from, std::min(begin + each, tasks)); });
    }
    widest = std::max(widest, threads.size());
    for (std::thread& thread : threads) thread.join();
  }
};

struct AttentionCase {
  int64_t batch, heads, queries, keys, dim, dim_v;
  const char* layout = "bhnd";  // or "packed": views of [B, N, 3, H, D]; "padded": rows with a gap behind each
  int bias_axes = -1;           // -1: none; bits 8, 4, 2, 1: the bias has the batch, head, query, key axis
  bool bool_bias = false;
  bool causal = false;
  bool grad_lse = false;
};

std::vector<int64_t> strides_of(const AttentionCase& c, int64_t rows, int64_t columns) {
  if (c.layout == std::string("packed")) {
    return {rows * 3 * c.heads * columns, columns, 3 * c.heads * columns, 1};
  }
  const int64_t row = columns + (c.layout == std::string("padded") ? 3 : 0);
  return {c.heads * rows * row, rows * row, row, 1};
}

struct Bias {
  std::vector<char> bytes;  // of bools
  Tensor values;
  BiasView view;

  Bias(const AttentionCase& c, DType dtype)
      : values(dtype, {c.bias_axes & 8 ? c.batch : 1, c.bias_axes & 4 ? c.heads : 1, c.bias_axes & 2 ? c.queries : 1,
                       c.bias_axes & 1 ? c.keys : 1}) {
    values.fill();
    if (c.bias_axes < 0) return;
    int64_t strides[4];
    for (int i = 0; i < 4; ++i) strides[i] = c.bias_axes & 8 >> i ? values.strides[i] : 0;
    view = {values.data, BiasType(int(dtype) + int(BiasType::kFloat16)), strides[0], strides[1], strides[2],
            strides[3]};
    if (!c.bool_bias) return;
    values.each([&](auto... index) { bytes.push_back(values.get(index...) > -1); });
    // The first query is masked from every key.
    for (int64_t j = 0; c.bias_axes & 2 && j < values.sizes[3]; ++j) bytes[j] = 0;
    view.data = bytes.data();
    view.type = BiasType::kBool;
  }
  double get(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (view.type == BiasType::kNone) return 0;
    const int64_t offset = b * view.batch_stride + h * view.head_stride + i * view.query_stride + j * view.key_stride;
    if (view.type == BiasType::kBool) return bytes[offset] ? 0 : -INFINITY;
    return decode(values.data + offset * int64_t(size_of(values.dtype)), values.dtype);
  }
};

// softmax(scale Q K^T + bias) V of one case, and its gradients, by the textbook.
struct Expected {
  std::vector<double> p, ds, lse, output;
  int64_t heads, queries, keys, dim_v;

  Expected(const AttentionCase& c, double scale, const Tensor& q, const Tensor& k, const Tensor& v, const Bias& bias,
           const Tensor& grad, const Tensor& grad_lse)
      : heads(c.heads), queries(c.queries), keys(c.keys), dim_v(c.dim_v) {
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = 0; i < queries; ++i) row(c, scale, q, k, v, bias, grad, grad_lse, b, h, i);
  }
  void row(const AttentionCase& c, double scale, const Tensor& q, const Tensor& k, const Tensor& v, const Bias& bias,
           const Tensor& grad, const Tensor& grad_lse, int64_t b, int64_t h, int64_t i) {
    std::vector<double> weight(keys), gradient(keys);
    double high = -INFINITY, total = 0, delta = 0;
    for (int64_t j = 0; j < keys; ++j) {
      for (int64_t d = 0; d < c.dim; ++d) weight[j] += scale * q.get(b, h, i, d) * k.get(b, h, j, d);
      weight[j] += bias.get(b, h, i, j) - (c.causal && j > i ? INFINITY : 0);
      for (int64_t d = 0; d < dim_v; ++d) gradient[j] += grad.get(b, h, i, d) * v.get(b, h, j, d);
      high = std::fmax(high, weight[j]);
    }
    for (double& w : weight) total += w = high == -INFINITY ? 0 : std::exp(w - high);
    for (double& w : weight) w /= total == 0 ? 1 : total;
    for (int64_t j = 0; j < keys; ++j) delta += weight[j] * gradient[j];
    for (int64_t j = 0; j < keys; ++j) {
      p.push_back(weight[j]);
      ds.push_back(weight[j] * (gradient[j] - delta + (c.grad_lse ? grad_lse.get(b, h, i, 0) : 0)));
    }
    lse.push_back(high == -INFINITY ? high : high + std::log(total));
    for (int64_t d = 0; d < dim_v; ++d) {
      double sum = 0;
      for (int64_t j = 0; j < keys; ++j) sum += weight[j] * v.get(b, h, j, d);
      output.push_back(sum);
    }
  }
  int64_t at(int64_t b, int64_t h, int64_t i) const { return (b * heads + h) * queries + i; }
};

void check_attention(const AttentionCase& c, DType dtype) {
  const double scale = c.dim == 64 ? 0.125 : 1 / std::sqrt(double(c.dim));
  const std::vector<int64_t> q_sizes{c.batch, c.heads, c.queries, c.dim}, k_sizes{c.batch, c.heads, c.keys, c.dim},
      v_sizes{c.batch, c.heads, c.keys, c.dim_v}, o_sizes{c.batch, c.heads, c.queries, c.dim_v};
  const auto q_steps = strides_of(c, c.queries, c.dim), k_steps = strides_of(c, c.keys, c.dim),
             v_steps = strides_of(c, c.keys, c.dim_v), o_steps = strides_of(c, c.queries, c.dim_v);
  // The outputs lie as [B, N, H, D] behind a packed projection.
  const std::vector<int64_t> bnhd{c.queries * c.heads * c.dim_v, c.dim_v, c.heads * c.dim_v, 1};
  const bool packed = c.layout == std::string("packed");
  Tensor q(dtype, q_sizes, q_steps), k(dtype, k_sizes, k_steps), v(dtype, v_sizes, v_steps);
  Tensor output(dtype, o_sizes, packed ? bnhd : o_steps, fault == "short-output" && c.queries > 30),
      grad(dtype, o_sizes, bnhd);
  const DType wide = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
  Tensor lse(wide, {c.batch, c.heads, c.queries, 1}), grad_lse(wide, {c.batch, c.heads, c.queries, 1});
  Bias bias(c, c.bias_axes == 5 ? DType::kFloat32 : dtype);
  for (Tensor* tensor : {&q, &k, &v, &grad, &grad_lse}) tensor->fill();
  const Expected e(c, scale, q, k, v, bias, grad, grad_lse);
  Tensor short_key(dtype, k_sizes, k_steps, true);

  AttentionBackwardParams p;
  p.batch = c.batch, p.num_heads = c.heads, p.seqlen_q = c.queries, p.seqlen_k = c.keys;
  p.head_dim = c.dim, p.head_dim_v = c.dim_v, p.dtype = dtype, p.is_causal = c.causal, p.scale = scale;
  p.query = q.view(), p.key = fault == "short-key" && c.keys > 30 ? short_key.view() : k.view(), p.value = v.view(),
  p.bias = bias.view;
  p.output = output.view(), p.lse = lse.data, p.grad_output = grad.view();
  p.grad_lse = c.grad_lse ? grad_lse.data : nullptr;
  const cpu::KernelTable& kernels = cpu::kernels();
  const int64_t forward_threads = 1 + int64_t(generator() % 3);
  cpu::attention_forward_over(kernels, p, forward_threads, Threads{forward_threads});
  if (!fault.empty()) return;
  compare("output", output, [&](auto b, auto h, auto i, auto d) { return e.output[e.at(b, h, i) * c.dim_v + d]; });
  for (size_t i = 0; i < e.lse.size(); ++i) {
    if (e.lse[i] == -INFINITY) encode(-1e3, wide, lse.data + i * size_of(wide));
  }
  compare("lse", lse, [&](auto b, auto h, auto i, auto) { return std::fmax(e.lse[e.at(b, h, i)], -1e3); });

  std::vector<char> first;
  for (int64_t threads : {1, 2, 3, 4, 16}) {
    Tensor dq(dtype, q_sizes, q_steps), dk(dtype, k_sizes, k_steps), dv(dtype, v_sizes, v_steps);
    p.grad_query = dq.view(), p.grad_key = dk.view(), p.grad_value = dv.view();
    Threads::widest = 0;
    cpu::attention_backward_over(kernels, p, threads, Threads{threads});
    // One head is work for eight threads.
    if (c.batch * c.heads == 1 && c.queries > 300 && Threads::widest < size_t(std::min(threads, int64_t(8)))) {
      std::fprintf(stderr, "wrong: %d threads had work of %d\n", int(Threads::widest), int(threads));
      std::exit(3);
    }
    std::vector<char> bits;
    for (Tensor* tensor : {&dq, &dk, &dv}) {
      tensor->each(
          [&](auto... index) { bits.insert(bits.end(), tensor->at(index...), tensor->at(index...) + size_of(dtype)); });
    }
    if (threads == 1) {
      first = bits;
      compare("grad_query", dq, [&](auto b, auto h, auto i, auto d) {
        double sum = 0;
        for (int64_t j = 0; j < c.keys; ++j) sum += scale * e.ds[e.at(b, h, i) * c.keys + j] * k.get(b, h, j, d);
        return sum;
      });
      compare("grad_key", dk, [&](auto b, auto h, auto j, auto d) {
        double sum = 0;
        for (int64_t i = 0; i < c.queries; ++i) sum += scale * e.ds[e.at(b, h, i) * c.keys + j] * q.get(b, h, i, d);
        return sum;
      });
      compare("grad_value", dv, [&](auto b, auto h, auto j, auto d) {
        double sum = 0;
        for (int64_t i = 0; i < c.queries; ++i) sum += e.p[e.at(b, h, i) * c.keys + j] * grad.get(b, h, i, d);
        return sum;
      });
    }
    if (bits != first) {
      std::fprintf(stderr, "wrong: other bits with %d threads\n", int(threads));
      std::exit(3);
    }
  }
}

struct PatchCase {
  int64_t batch, channels, rows, columns, patch_height, patch_width, embed_dim;
  bool channels_last = false;
  bool bias = true;
  int64_t margin = 0;                     // pixels of the image beyond its patches, at the right and at the bottom
  int64_t gap = 0;                        // elements between the tokens
  int64_t row_step = 0, column_step = 0;  // from patch to patch; 0 is the patch
};

void check_patch_embed(const PatchCase& c, DType dtype) {
  const bool tiles = c.row_step == 0;
  const int64_t row_step = tiles ? c.patch_height : c.row_step, column_step = tiles ? c.patch_width : c.column_step;
  const int64_t height = (c.rows - 1) * row_step + c.patch_height, tokens = c.rows * c.columns;
  const int64_t width = (c.columns - 1) * column_step + c.patch_width;
  const int64_t line = width + c.margin, lines = height + c.margin, patch = c.channels * c.patch_height * c.patch_width;
  std::vector<int64_t> steps{c.channels * lines * line, lines * line, line, 1};
  if (c.channels_last) steps = {c.channels * lines * line, 1, line * c.channels, c.channels};
  const std::vector<int64_t> pixels{c.batch, c.channels, height, width};
  Tensor images(dtype, pixels, steps, fault == "short-image" && c.rows > 1), grad_images(dtype, pixels, steps);
  Tensor weight(dtype, {1, 1, c.embed_dim, patch}, {}, fault == "short-weight" && c.rows > 1),
      grad_weight(dtype, {1, 1, c.embed_dim, patch});
  Tensor bias(dtype, {1, 1, 1, c.embed_dim}), grad_bias(dtype, {1, 1, 1, c.embed_dim});
  const int64_t row = c.embed_dim + c.gap;
  const std::vector<int64_t> token_sizes{1, c.batch, tokens, c.embed_dim}, token_steps{0, tokens * row, row, 1};
  Tensor output(dtype, token_sizes, token_steps), grad(dtype, token_sizes, token_steps);
  if (fault.empty()) {
    for (Tensor* tensor : {&images, &weight, &bias, &grad}) tensor->fill();
  }

  PatchEmbedParams p;
  p.batch = c.batch, p.in_channels = c.channels, p.rows = c.rows, p.columns = c.columns, p.embed_dim = c.embed_dim;
  p.patch_height = c.patch_height, p.patch_width = c.patch_width, p.dtype = dtype;
  p.patch_row_step = row_step, p.patch_column_step = column_step;
  p.image_stride = steps[0], p.channel_stride = steps[1], p.height_stride = steps[2], p.width_stride = steps[3];
  p.token_batch_stride = token_steps[1], p.token_stride = token_steps[2];
  const cpu::KernelTable& kernels = cpu::kernels();
  auto run = [&](auto tasks, auto kernel, const Tensor& x, const Tensor& w, const Tensor& b, const Tensor& y) {
    p.images = x.data, p.weight = w.data, p.bias = c.bias ? b.data : nullptr, p.tokens = y.data;
    Threads{3}(tasks(p), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  };
  run(kernels.patch_embed_forward_tasks, kernels.patch_embed_forward, images, weight, bias, output);
  if (!fault.empty()) return;
  run(kernels.patch_embed_backward_weight_tasks, kernels.patch_embed_backward_weight, images, grad_weight, grad_bias,
      grad);

  // Element k of the patch of token t.
  auto pixel = [&](int64_t b, int64_t t, int64_t k) {
    const int64_t x = k % c.patch_width, y = k / c.patch_width % c.patch_height;
    return images.get(b, k / (c.patch_width * c.patch_height), t / c.columns * row_step + y,
                      t % c.columns * column_step + x);
  };
  compare("tokens", output, [&](auto, auto b, auto t, auto d) {
    double sum = c.bias ? bias.get(0, 0, 0, d) : 0;
    for (int64_t k = 0; k < patch; ++k) sum += pixel(b, t, k) * weight.get(0, 0, d, k);
    return sum;
  });
  auto over_tokens = [&](const auto& f) {
    double sum = 0;
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t t = 0; t < tokens; ++t) sum += f(b, t);
    return sum;
  };
  compare("grad_weight", grad_weight, [&](auto, auto, auto d, auto k) {
    return over_tokens([&](int64_t b, int64_t t) { return pixel(b, t, k) * grad.get(0, b, t, d); });
  });
  if (c.bias) {
    compare("grad_bias", grad_bias, [&](auto, auto, auto, auto d) {
      return over_tokens([&](int64_t b, int64_t t) { return grad.get(0, b, t, d); });
    });
  }
  if (!tiles) return;
  run(kernels.patch_embed_backward_images_tasks, kernels.patch_embed_backward_images, grad_images, weight, bias, grad);
  compare("grad_images", grad_images, [&](auto b, auto channel, auto y, auto x) {
    const int64_t t = y / c.patch_height * c.columns + x / c.patch_width;
    const int64_t k = (channel * c.patch_height + y % c.patch_height) * c.patch_width + x % c.patch_width;
    double sum = 0;
    for (int64_t d = 0; d < c.embed_dim; ++d) sum += grad.get(0, b, t, d) * weight.get(0, 0, d, k);
    return sum;
  });
}

// Every task runs once, in ranges that end with a unit or a share; what a thread that is held up has left of its share,
// the others do.
void check_shares(int64_t tasks, int64_t unit, int64_t threads) {
  using Clock = std::chrono::steady_clock;
  std::vector<std::atomic<int>> runs(tasks);
  std::atomic<int64_t> done = 0;
  cpu::share_out(tasks, unit, threads, Threads{threads}, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) ++runs[task];
    done += end - begin;
    const bool held_up = begin == 0 && threads > 1;
    const auto deadline = Clock::now() + std::chrono::seconds(20);
    while (held_up && done < tasks && Clock::now() < deadline) std::this_thread::yield();
    const int64_t shares = std::min(threads, tasks);
    bool whole = end % unit == 0;
    for (int64_t i = 1; i <= shares; ++i) whole |= end == tasks * i / shares;
    if ((held_up && done < tasks) || begin >= end || !whole) {
      std::fprintf(stderr, "wrong: tasks [%d, %d) of %d for %d threads, %d done\n", int(begin), int(end), int(tasks),
                   int(threads), int(done));
      std::exit(3);
    }
  });
  if (done == tasks && std::all_of(runs.begin(), runs.end(), [](int count) { return count == 1; })) return;
  std::fprintf(stderr, "wrong: %d of %d tasks done\n", int(done), int(tasks));
  std::exit(3);
}

void check_all_shares() {
  for (int64_t tasks : {1, 2, 12, 48, 49})
    for (int64_t threads : {1, 2, 3, 16})
      for (int64_t unit : {1, 4}) check_shares(tasks, unit, threads);
}

const AttentionCase kAttention[] = {
    {1, 1, 1, 1, 1, 1},
    {1, 2, 1, 9, 64, 64},
    {2, 3, 37, 37, 64, 64, "packed"},
    {1, 3, 65, 65, 17, 17, "packed", -1, false, true, true},
    {1, 2, 33, 41, 72, 40, "padded", -1, false, false, true},
    {1, 1, 35, 67, 256, 256, "padded"},
    {1, 2, 50, 50, 32, 32, "packed", 4 | 2 | 1},
    {2, 2, 35, 35, 64, 64, "bhnd", 8 | 1, true},
    {1, 2, 19, 23, 8, 8, "bhnd", 2 | 1, true},
    {2, 2, 19, 23, 8, 72, "bhnd", 4 | 2},
    {2, 1, 19, 23, 1, 3, "bhnd", 4 | 1},  // float32, whatever the dtype
    {1, 1, 9, 7, 5, 5, "padded", 0, false, true},
    {1, 1, 5, 1100, 16, 16, "bhnd", 2 | 1},  // several blocks of keys
    {1, 1, 301, 7, 16, 16},                  // leaves of several blocks, parts of several leaves
    // Enough keys for the parts of split.h.
    {1, 2, 70, 97, 64, 40, "packed"},
    {2, 1, 35, 131, 72, 72, "padded", 8 | 2 | 1, false, true, true},
    {1, 1, 81, 81, 64, 64, "bhnd", -1, true},
    {1, 2, 35, 133, 40, 72, "padded"},  // five keys beside whole panels
    {2, 1, 35, 98, 64, 64, "bhnd", 8 | 2 | 1, false, true},
    {1, 1, 520, 65, 64, 64, "packed"},  // eight leaves of groups, one of two
};

const PatchCase kPatches[] = {
    {1, 1, 1, 1, 1, 1, 1},
    {2, 3, 2, 3, 3, 5, 17},
    {1, 3, 3, 2, 7, 7, 200, true, false},
    {2, 2, 5, 7, 2, 2, 33, false, true, 1, 3},
    {1, 3, 2, 2, 14, 14, 40, true, true, 3, 1},
    {3, 1, 13, 7, 4, 4, 16, false, false},
    {1, 3, 2, 2, 16, 16, 24, false, true, 5},
    {2, 3, 5, 6, 7, 7, 33, false, true, 0, 0, 4, 4},
    {2, 3, 3, 5, 7, 7, 17, true, true, 1, 0, 4, 5},
    {1, 2, 4, 3, 4, 6, 40, false, true, 0, 3, 7, 3},
    {1, 3, 3, 4, 16, 16, 24, false, false, 0, 0, 8, 19},
    {1, 3, 2, 2, 32, 32, 40},         // operands that are split in parts
    {1, 1, 13, 21, 16, 8, 70, true},  // more tokens than a task
};

}  // namespace

int main(int count, char** arguments) {
  fault = count > 1 ? arguments[1] : "";
  if (fault.empty()) check_all_shares();
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64}) {
    if (count > 2 && dtype != DType::kFloat32) continue;
    for (const AttentionCase& c : kAttention) check_attention(c, dtype);
    for (const PatchCase& c : kPatches) check_patch_embed(c, dtype);
  }
  std::printf("%s: %d comparisons\n", cpu::kernels().capability, int(compared));
}
