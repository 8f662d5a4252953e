// The ops of namespace mft_cpu that change a mask in its weight's own memory (cpu/in_place.h).
// mft_kernels/backends/cpu/in_place.py makes all tensors contiguous.
#include "cpu/in_place.h"

#include <optional>

#include "operands.h"

namespace mft::ops {
namespace {

using Optional = std::optional<Tensor>;

Matrix rows(const Tensor& weight, void* data) { return flat(weight, weight.size(-1), "weight", data); }

Bits bits(const Tensor& packed, const Matrix& weight, const char* name) {
  const int64_t words = (weight.columns + 31) / 32;
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Int && packed.is_contiguous() && packed.dim() >= 2 &&
                      packed.size(-1) == words && packed.numel() == weight.rows * words,
                  name, " must be int32 and contiguous, a word for 32 elements of a row of the weight");
  return {static_cast<const uint32_t*>(packed.const_data_ptr()), weight.rows, weight.columns};
}

const void* values(const Tensor& aside, const Tensor& weight, const Bits& held) {
  STD_TORCH_CHECK(aside.scalar_type() == weight.scalar_type() && aside.is_contiguous() &&
                      aside.numel() == mft::dropped_count(held),
                  "aside must have a value of the weight's dtype for each dropped element");
  return aside.const_data_ptr();
}

Tensor put_aside(Tensor weight, Tensor packed, Optional aside, Optional held) {
  const Matrix w = rows(weight, const_cast<void*>(weight.const_data_ptr()));
  const Bits now = bits(packed, w, "packed");
  Bits before = now;
  const void* in = nullptr;
  if (aside.has_value()) {
    STD_TORCH_CHECK(held.has_value(), "aside must come with the mask that dropped it");
    before = bits(*held, w, "held");
    in = values(*aside, weight, before);
  }
  Tensor out = torch::stable::new_empty(weight, {mft::dropped_count(now)});
  mft::put_aside(out.mutable_data_ptr(), w.data, bytes_of(w.format), now, in, before);
  return out;
}

void put_back_(Tensor weight, Tensor aside, Tensor held, Optional wanted) {
  const Matrix w = rows(weight, weight.mutable_data_ptr());
  const Bits before = bits(held, w, "held");
  const void* in = values(aside, weight, before);
  const Bits now = wanted.has_value() ? bits(*wanted, w, "wanted") : before;
  mft::put_back(w.data, bytes_of(w.format), in, before, wanted.has_value() ? &now : nullptr);
}

void drop_(Tensor weight, Tensor packed, Optional held) {
  const Matrix w = rows(weight, weight.mutable_data_ptr());
  const Bits now = bits(packed, w, "packed"), before = held.has_value() ? bits(*held, w, "held") : now;
  mft::drop(w.data, bytes_of(w.format), now, held.has_value() ? &before : nullptr);
}

}  // namespace

MFT_OPS(CPU) {
  MFT_OP(put_aside, "(Tensor weight, Tensor packed, Tensor? aside, Tensor? held) -> Tensor");
  MFT_OP(put_back_, "(Tensor(a!) weight, Tensor aside, Tensor held, Tensor? wanted) -> ()");
  MFT_OP(drop_, "(Tensor(a!) weight, Tensor packed, Tensor? held) -> ()");
}

}  // namespace mft::ops
