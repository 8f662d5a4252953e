// The op product_many: a mask per row. There are up to 16 masks, (N, ceil(K / 32)) each. tasks are int64 or int32,
// contiguous, one per `each` rows of x.
#include <vector>

#include "operands.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor product_many(Tensor x, Tensor weight, std::vector<Tensor> masks, Tensor tasks, std::optional<Tensor> bias,
                    int64_t each) {
  const mft::cuda::Place place(x);
  mft::cuda::ManyProduct p;
  p.weight = mft::cuda::weight_of(weight, place);
  p.in = mft::cuda::like_weight(x, place, p.weight, "x");
  mft::cuda::check_size(p.in, p.in.rows, p.weight.columns, "x");
  STD_TORCH_CHECK(masks.size() <= mft::cuda::kMostMasks, "masks must be at most ", mft::cuda::kMostMasks);
  p.count = static_cast<int>(masks.size());
  for (int i = 0; i < p.count; ++i) p.masks[i] = mft::cuda::words(masks[i], place, p.weight, "masks");
  mft::cuda::check_device(tasks, place, "tasks");
  p.long_tasks = tasks.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK((p.long_tasks || tasks.scalar_type() == ScalarType::Int) && tasks.is_contiguous(),
                  "tasks must be int64 or int32, and contiguous");
  STD_TORCH_CHECK(each > 0 && (p.in.rows == 0 || tasks.numel() * each == p.in.rows), "tasks must be one for each ", each,
                  " of ", p.in.rows, " rows");
  p.tasks = tasks.const_data_ptr(), p.each = each;
  p.bias = mft::cuda::bias_of(bias, place, p.weight);
  const int64_t sizes[] = {p.in.rows, p.weight.rows};
  Tensor out = torch::stable::new_empty(x, {sizes, 2});
  p.out = mft::cuda::output(out, place, "out");
  const std::optional<Tensor> workspace = mft::cuda::workspace_of(x, mft::cuda::plan_many(p, place.device));
  if (workspace.has_value()) p.workspace = workspace->mutable_data_ptr();
  mft::cuda::check_launch(mft::cuda::product_many(p, place.device));
  return out;
}

}  // namespace

MFT_OPS(m) {
  m.def("product_many(Tensor x, Tensor weight, Tensor[] masks, Tensor tasks, Tensor? bias, int each) -> Tensor");
}

MFT_OPS_ON(MFT_KEY, m) { m.impl("product_many", TORCH_BOX(&product_many)); }
