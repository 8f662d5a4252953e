// The choice of a path for a product.
#include "choice.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

#include "few_tokens.h"
#include "slab.h"

namespace mft {
namespace {

using Names = std::vector<std::string>;  // in the order of the enumeration
const Names kPaths{"auto", "few", "fused", "slabs"}, kProducts{"forward", "d_x", "d_scores"},
    kFormats{"float32", "bfloat16", "float16"};

std::string listed(const Names& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

template <typename Enumeration>
Enumeration named(const Names& names, const std::string& name, const char* what) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found != names.end()) return static_cast<Enumeration>(found - names.begin());
  throw std::invalid_argument(std::string(what) + " must be one of " + listed(names) + ", got '" + name + "'");
}

constexpr const char* kCapabilities[] = {"amx", "avx512_bf16", "avx512", "avx2", "portable"};
constexpr int kAvx512 = 2, kPortable = 4;

int index_of(const std::string& capability) {
  if (capability == "amx_emulated") return 0;
  for (int i = 0; i < kPortable; ++i) {
    if (capability == kCapabilities[i]) return i;
  }
  return kPortable;
}

// reading: picoseconds to read a byte. byte, mask, product, number: picoseconds of work on a byte, on a byte of the
// mask, on a product and on a number. call: microseconds per call.
struct Cost {
  float reading, byte, mask, product, number, call;
};

struct Measured {
  const char* capability;
  Format format;
  Product product;
  Path path;
  Cost cost;
};

constexpr Measured kMeasured[] = {
#include "choice_costs.inl"
};

// Costs by instruction set, format, product and path; infinite if there is no such path.
class Costs {
 public:
  Costs() {
    of_.fill({0, 0, 0, 0, 0, std::numeric_limits<float>::infinity()});
    for (const Measured& m : kMeasured) of_[place(index_of(m.capability), m.format, m.product, m.path)] = m.cost;
    // AMX and AVX512-BF16 multiply only bf16. Where they have no costs of their own, AVX-512 does the work.
    for (const int lesser : {kAvx512, kAvx512 - 1}) {
      for (int i = 0; i < kEach; ++i) {
        Cost& cost = of_[(lesser - 1) * kEach + i];
        if (std::isinf(cost.call)) cost = of_[lesser * kEach + i];
      }
    }
  }
  const Cost& at(int capability, Format format, Product product, Path path) const {
    return of_[place(capability, format, product, path)];
  }

 private:
  static constexpr int kEach = 3 * 3 * 4;
  static int place(int capability, Format format, Product product, Path path) {
    return capability * kEach + (static_cast<int>(format) * 3 + static_cast<int>(product)) * 4 + static_cast<int>(path);
  }
  std::array<Cost, (kPortable + 1) * kEach> of_;
};

const Cost& cost_of(const std::string& capability, const Call& call, Path path) {
  static const Costs costs;
  return costs.at(index_of(capability), call.format, call.product, path);
}

}  // namespace

Path path_of(const std::string& name) { return named<Path>(kPaths, name, "path"); }
Product product_of(const std::string& name) { return named<Product>(kProducts, name, "product"); }
Format format_of(const std::string& name) { return named<Format>(kFormats, name, "dtype"); }

const char* name_of(Path path) { return kPaths[static_cast<int>(path)].c_str(); }

double weight_bytes(Product product, int weight, double mask, int out, bool accumulate) {
  const int times = product != Product::kGradScores ? 0 : accumulate ? 2 : 1;
  return weight + mask + times * out;
}

Work work_of(const std::string& capability, const Call& call, Path path) {
  const bool grad_x = call.product == Product::kGradX;
  const double elements = static_cast<double>(call.rows) * call.columns, bytes = elements * call.weight_bytes;
  const double mask = elements * call.mask_bytes;
  // Numbers of the operand that meets every slab, and of the other operand or the result.
  const double common = static_cast<double>(call.tokens) * (grad_x ? call.rows : call.columns);
  const double other = static_cast<double>(call.tokens) * (grad_x ? call.columns : call.rows);
  if (path == Path::kFew) {  // reads the weight once per turn
    const double turns = divide_up(call.tokens, kFewTokens);
    return {bytes * turns, mask * turns, elements * call.tokens, common + other};
  }
  if (path == Path::kFused) {  // has tiles of 16 tokens; d_x by vectors cuts tokens into nearly equal tiles
    const bool by_amx = index_of(capability) == 0 && call.format == Format::kBFloat16;  // vectors do everything else
    const bool cut = grad_x && !by_amx;
    const int64_t tokens = cut ? std::max<int64_t>(call.tokens, 16) : divide_up(call.tokens, 16) * 16;
    return {bytes, mask, elements * tokens, common + other};
  }
  const int64_t length = grad_x ? call.columns : call.rows, across = grad_x ? call.rows : call.columns;
  const int64_t width = bytes_of(call.format), each = across * width;
  const int64_t slabs = length == 0 ? 0 : divide_up(length, slab_length(each, length, call.tokens * each));
  return {bytes, mask, elements * call.tokens, common * slabs + other};
}

double microseconds(const std::string& capability, const Call& call, Path path) {
  const Cost& cost = cost_of(capability, call, path);
  const Work work = work_of(capability, call, path);
  const double reading = cost.reading * work[0];
  const double working = cost.byte * work[0] + cost.mask * work[1] + cost.product * work[2] + cost.number * work[3];
  return std::max(reading, working) * 1e-6 + cost.call;
}

std::vector<Path> paths(const std::string& capability, const Call& call) {
  const bool empty = call.rows == 0 || call.columns == 0;
  std::vector<std::pair<double, Path>> found;
  for (const Path path : {Path::kFew, Path::kFused, Path::kSlabs}) {
    const bool exists = !std::isinf(cost_of(capability, call, path).call);
    const bool can = exists && !empty && (path == Path::kFused || call.tokens > 0);
    if (path == Path::kSlabs || can) found.emplace_back(microseconds(capability, call, path), path);
  }
  std::sort(found.begin(), found.end());
  std::vector<Path> order;
  for (const auto& [took, path] : found) order.push_back(path);
  return order;
}

Path choose(const std::string& capability, const Call& call, Path asked) {
  const std::vector<Path> found = paths(capability, call);
  if (asked == Path::kAuto) return found.front();
  if (std::find(found.begin(), found.end(), asked) != found.end()) return asked;
  Names names;
  for (const Path path : found) names.push_back(name_of(path));
  const auto size = [](int64_t length) { return std::to_string(length); };
  const std::string what = kProducts[static_cast<int>(call.product)] + " in " + kFormats[static_cast<int>(call.format)];
  const std::string sizes = size(call.tokens) + ", " + size(call.rows) + ", " + size(call.columns);
  throw std::invalid_argument("path must be one of " + listed(names) + " for " + what + ", M, N, K = " + sizes + " by " +
                              capability + ", got '" + name_of(asked) + "'");
}

}  // namespace mft
