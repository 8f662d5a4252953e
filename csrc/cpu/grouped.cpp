// The products of experts (grouped.h).
#include "grouped.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "few_linear.h"
#include "huge_pages.h"
#include "parallel.h"
#include "scratch.h"
#include "shared_work.h"

namespace mft {
namespace {

constexpr int64_t kUnit = 32;  // a weight is cut at multiples of this, by rows or columns: a word of the mask
// Multiplications up to which one thread computes a product with torch's GEMM. On its own, torch would share the
// product and pay as much for that. Such products are never cut, and larger ones are always shared, so that their bits
// do not depend on other experts.
constexpr double kSmallSlabs = 64 << 20;
// Bytes above which glibc's malloc returns memory whose pages the operating system has yet to create.
constexpr int64_t kAlwaysFresh = 32 << 20;
constexpr int64_t kClearedAtOnce = 256 << 10;
constexpr double kClearing = 100e-6;  // microseconds per byte that becomes 0, mostly in new pages

struct Group {
  int64_t expert, first, rows;  // rows of tokens
};

// Returns the experts that have rows. No group has rows beyond the tokens, whatever the offsets say.
std::vector<Group> groups_of(const int32_t* offsets, int64_t experts, int64_t tokens) {
  std::vector<Group> found;
  int64_t begin = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t end = std::min<int64_t>(std::max<int64_t>(offsets[e], begin), tokens);
    if (begin < end) found.push_back({e, begin, end - begin});
    begin = end;
  }
  return found;
}

// The contiguous matrix of an expert: in place, or a copy.
class Dense {
 public:
  Dense(const Experts& all, int64_t expert)
      : matrix_{nullptr, all.format, all.rows, all.columns, all.columns} {
    if (all.data == nullptr) return;
    const int64_t width = bytes_of(all.format);
    char* from = static_cast<char*>(all.data) + expert * all.strides[0] * width;
    if (all.strides[1] == all.columns && all.strides[2] == 1) {
      matrix_.data = from;
      return;
    }
    memory_.emplace(all.rows * all.columns * width);
    matrix_.data = memory_->get();
    parallel_for(0, (all.rows + kUnit - 1) / kUnit, 1 + 512 / (all.columns + 1), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) copy(from, all, unit * kUnit, std::min(all.rows, (unit + 1) * kUnit));
    });
  }
  const Matrix& get() const { return matrix_; }

 private:
  // Copies some rows column by column, so that a transposed matrix is read in the order of its memory.
  void copy(const char* from, const Experts& all, int64_t first, int64_t end) {
    const auto copy_elements = [&](auto element) {
      using Element = decltype(element);
      const auto* in = reinterpret_cast<const Element*>(from);
      auto* out = static_cast<Element*>(matrix_.data);
      for (int64_t c = 0; c < all.columns; ++c) {
        for (int64_t r = first; r < end; ++r) {
          out[r * all.columns + c] = in[r * all.strides[1] + c * all.strides[2]];
        }
      }
    };
    bytes_of(all.format) == 4 ? copy_elements(uint32_t{}) : copy_elements(uint16_t{});
  }

  std::optional<Scratch> memory_;
  Matrix matrix_;
};

int64_t words_in(int64_t rows, int64_t columns) { return rows * ((columns + 31) / 32); }

MaskSource mask_of(const ExpertMasks& all, const Experts& weight, int64_t expert) {
  if (all.scores == nullptr) {
    const uint32_t* words = all.words + expert * words_in(weight.rows, weight.columns);
    return {nullptr, Format::kFloat32, words, {0, 0, false}, weight.columns};
  }
  return {skip(all.scores, expert * weight.rows * weight.columns, all.score_format), all.score_format, nullptr,
          all.ranges[expert], weight.columns};
}

// Returns the mask or sign of the part of a matrix that begins at this row and column.
template <typename Source, typename... Place>
Source narrowed(Source source, Place... place) {
  const auto first = source.row(place...);
  source.scores = first.scores, source.words = first.words;
  return source;
}

Path served(const Capability& cpu, const Call& call, Path asked) {
  const std::vector<Path> found = paths(cpu.name, call);
  return std::find(found.begin(), found.end(), asked) != found.end() ? asked : found.front();
}

Load load_of(const Capability& cpu, const Call& call, Path path, int64_t length) {
  Load load{microseconds(cpu.name, call, path), length, kUnit};
  if (path == Path::kSlabs) {
    const double products = static_cast<double>(call.tokens) * call.rows * call.columns;
    load.way = products <= kSmallSlabs ? Load::Way::kApart : Load::Way::kTogether;
  }
  return load;
}

}  // namespace

void grouped_product(const Capability& cpu, const Matrix& y, const Matrix& x, const Experts& weight,
                     const ExpertMasks& masks, const int32_t* offsets, const void* bias, bool transposed, Path asked) {
  const std::vector<Group> groups = groups_of(offsets, weight.count, x.rows);
  const int64_t used = groups.empty() ? 0 : groups.back().first + groups.back().rows;
  const int64_t nobodys = (y.rows - used) * y.columns * bytes_of(y.format);
  if (nobodys > 0) std::memset(y.row(used), 0, nobodys);  // an empty y has no memory

  const Matrix shape{nullptr, weight.format, weight.rows, weight.columns, weight.columns};
  std::vector<Path> taken;
  std::vector<Load> loads;
  for (const Group& group : groups) {
    const Call call = call_of(transposed ? Product::kGradX : Product::kForward, shape,
                              mask_of(masks, weight, group.expert), group.rows);
    taken.push_back(served(cpu, call, asked));
    loads.push_back(load_of(cpu, call, taken.back(), y.columns));
  }
  // Computes columns `part` of the rows of group i.
  const auto multiply = [&](int64_t i, Columns part) {
    const Group& group = groups[i];
    const Dense dense(weight, group.expert);
    const Matrix in = x.narrow_rows(group.first, group.rows), out = y.narrow_rows(group.first, group.rows);
    const MaskSource mask = mask_of(masks, weight, group.expert);
    const char* added = skip(bias, group.expert * y.columns, y.format);
    const int64_t count = part.end - part.first;
    if (taken[i] == Path::kFew) {
      const auto few = transposed ? few_grad_x : few_masked_linear;
      few(cpu, out, in, dense.get(), mask, added, part);
    } else if (transposed) {
      grad_x(cpu, out.narrow_columns(part.first, count), in, dense.get().narrow_columns(part.first, count),
             narrowed(mask, 0, part.first), taken[i], skip(added, part.first, y.format));
    } else {
      masked_linear(cpu, out.narrow_columns(part.first, count), in, dense.get().narrow_rows(part.first, count),
                    narrowed(mask, part.first, 0), skip(added, part.first, y.format), taken[i]);
    }
  };
  share(
      loads, [&](int64_t i) { multiply(i, {0, y.columns}); },
      [&](const Part& part) { multiply(part.load, {part.first, part.end}); });
}

void grouped_grad_scores(const Capability& cpu, const Experts& out, const Matrix& grad_output, const Matrix& x,
                         const int32_t* offsets, const Experts& weight, const SignSource& sign, bool accumulate,
                         Path asked) {
  std::vector<Group> groups = groups_of(offsets, out.count, x.rows);
  const int64_t elements = out.rows * out.columns, bytes = elements * bytes_of(out.format);
  const bool fresh = !accumulate && bytes * out.count > kAlwaysFresh;
  const Matrix shape{weight.data, x.format, out.rows, out.columns, out.columns};
  std::vector<Path> taken;
  std::vector<Load> loads;
  for (const Group& group : groups) {
    const Call call = call_of({nullptr, out.format, out.rows, out.columns, out.columns}, shape, sign, accumulate, group.rows);
    taken.push_back(served(cpu, call, asked));
    loads.push_back(load_of(cpu, call, taken.back(), out.rows));
  }
  const auto multiplied = static_cast<int64_t>(groups.size());
  if (!accumulate) {  // the experts without rows
    for (int64_t e = 0, g = 0; e < out.count; ++e) {
      if (g < multiplied && groups[g].expert == e) {
        ++g;
        continue;
      }
      groups.push_back({e, 0, 0});
      loads.push_back({kClearing * static_cast<double>(bytes), out.rows, kUnit});
    }
  }
  // Computes rows first .. end of the result of group i.
  const auto add_up = [&](int64_t i, int64_t first, int64_t end) {
    const Group& group = groups[i];
    char* result = static_cast<char*>(out.data) + group.expert * bytes + first * out.columns * bytes_of(out.format);
    if (i >= multiplied) {
      const int64_t count = (end - first) * out.columns * bytes_of(out.format);
      for (int64_t done = 0; done < count; done += kClearedAtOnce) {
        const int64_t here = std::min(kClearedAtOnce, count - done);
        if (fresh) map_pages(result + done, here);
        std::memset(result + done, 0, here);
      }
      return;
    }
    const int64_t before = group.expert * out.rows;
    const Dense dense(weight, group.expert);
    Matrix factor = shape.data == nullptr ? shape : dense.get().narrow_rows(first, end - first);
    factor.rows = end - first;
    grad_scores(cpu, {result, out.format, end - first, out.columns, out.columns},
                grad_output.narrow_rows(group.first, group.rows).narrow_columns(first, end - first),
                x.narrow_rows(group.first, group.rows), factor, narrowed(sign, before + first), accumulate, taken[i],
                fresh);
  };
  share(
      loads, [&](int64_t i) { add_up(i, 0, out.rows); },
      [&](const Part& part) { add_up(part.load, part.first, part.end); });
}

}  // namespace mft
