// The functions of api.h for Python, run in the emulator. They take a struct's address and return "" or the error.
#include <string>

#include "api.h"
#include "decode_cut.h"
#include "emulator/machine.h"
#include "tile_cost.h"

namespace mft::cuda {

// Weak symbols: null if no compiled file defines them.
#define MFT_WEAK __attribute__((weak))
MFT_WEAK std::string refusal_sm90(const Product&);
MFT_WEAK Plan plan_sm90(const Product&, const Device&);
MFT_WEAK Plan plan_sm80(const Product&, const Device&);
MFT_WEAK Plan plan_sm90(const ScoreGrad&, const Device&);
MFT_WEAK Plan plan_sm80(const ScoreGrad&, const Device&);
MFT_WEAK std::string product_sm90(const Product&, const Device&);
MFT_WEAK std::string product_sm80(const Product&, const Device&);
MFT_WEAK std::string score_grad_sm80(const ScoreGrad&, const Device&);
MFT_WEAK bool decodes(const Product&, const Device&);
MFT_WEAK bool takes_decode(const Product&);
MFT_WEAK Plan plan_decode(const Product&, const Device&);
MFT_WEAK Plan plan_general(const Product&, const Device&);
MFT_WEAK std::string decode_sm80(const Product&, const Device&);
MFT_WEAK std::string product_general(const Product&, const Device&);
MFT_WEAK DecodeCut decode_cut(const Product&, const Device&, bool);
MFT_WEAK std::string kept_threshold(const Select&, const Device&);
MFT_WEAK std::string pack_mask(const PackMask&, const Device&);
MFT_WEAK std::string pack_signs(const PackSigns&, const Device&);
MFT_WEAK int64_t select_workspace(Type);

// CUTLASS's kernels. The rest of score_grad_sm90 is compiled.
std::string score_grad_sm90_bf16(const ScoreGrad&, const Device&) { return "CUTLASS's kernels are not executed"; }
std::string score_grad_sm90_fp16(const ScoreGrad&, const Device&) { return "CUTLASS's kernels are not executed"; }

namespace {

// Bytes for each block, from the CUDA programming guide's table of compute capabilities.
int shared_limit(int capability) {
  const bool small = capability == 86 || capability == 89 || capability >= 120;
  return 1024 * (small ? 99 : capability < 90 ? 163 : 227);
}

template <class Asked>
const char* call(std::string (*function)(const Asked&, const Device&), const Asked& asked, const Device& device,
                 int limit) {
  static std::string text;
  const emulator::Settings before = emulator::settings();
  emulator::Settings settings = before;
  settings.shared_limit = limit;
  emulator::set_settings(settings);
  text = function == nullptr ? "no compiled file has this function" : function(asked, device);
  emulator::set_settings(before);  // the bindings launch in this process without setting a device
  return text.c_str();
}

template <class Asked>
const char* call(std::string (*function)(const Asked&, const Device&), const Asked& asked, const Device& device) {
  return call(function, asked, device, shared_limit(device.capability));
}

template <class Asked>
Plan plan_of(Plan (*function)(const Asked&, const Device&), const Asked& asked, const Device& device) {
  return function == nullptr ? Plan{} : function(asked, device);
}

// Shared memory of a block that leaves room for a second one on the multiprocessor; the system takes 1 KiB of each.
int half_of_shared(const Device& device) { return device.shared_bytes / 2 - 1024; }

}  // namespace
}  // namespace mft::cuda

using namespace mft::cuda;

extern "C" {

const char* emulated_product_sm80(const Product& p, const Device& d) { return call(&product_sm80, p, d); }
const char* emulated_product_decode(const Product& p, const Device& d) {
  return takes_decode(p) ? call(&decode_sm80, p, d) : "decode_sm80 does not take it";
}
// The general kernel takes or refuses whatever decode_sm80 does not take.
const char* emulated_product_general(const Product& p, const Device& d) {
  return takes_decode(p) ? call(&product_general, p, d) : call(&product_sm80, p, d);
}
const char* emulated_score_grad_sm80(const ScoreGrad& p, const Device& d) {
  return call(&score_grad_sm80, p, d, half_of_shared(d));
}
const char* emulated_kept_threshold(const Select& p, const Device& d) { return call(&kept_threshold, p, d); }
const char* emulated_pack_mask(const PackMask& p, const Device& d) { return call(&pack_mask, p, d); }
const char* emulated_pack_signs(const PackSigns& p, const Device& d) { return call(&pack_signs, p, d); }

const char* emulated_product_sm90(const Product& p, const Device& d) {
  std::string (*const refusal_of)(const Product&) = &refusal_sm90;
  static std::string refusal;
  refusal = refusal_of == nullptr ? "" : refusal_of(p);
  return refusal.empty() ? call(&product_sm90, p, d) : refusal.c_str();
}

int64_t emulated_select_workspace(int type) {
  return &select_workspace == nullptr ? 0 : select_workspace(static_cast<Type>(type));
}

void emulated_plan_product_sm80(const Product& p, const Device& d, Plan* plan) { *plan = plan_of(&plan_sm80, p, d); }
void emulated_plan_product_decode(const Product& p, const Device& d, Plan* plan) {
  *plan = takes_decode(p) ? plan_of(&plan_decode, p, d) : Plan{};
}
void emulated_plan_product_general(const Product& p, const Device& d, Plan* plan) {
  *plan = takes_decode(p) ? plan_of(&plan_general, p, d) : plan_of(&plan_sm80, p, d);
}
void emulated_plan_product_sm90(const Product& p, const Device& d, Plan* plan) {
  std::string (*const refusal)(const Product&) = &refusal_sm90;
  *plan = refusal == nullptr || !refusal(p).empty() ? Plan{} : plan_of(&plan_sm90, p, d);
}

void emulated_set_settings(unsigned seed, int asynchrony, int schedule) {
  emulator::set_settings({seed, static_cast<emulator::Asynchrony>(asynchrony), emulator::settings().shared_limit,
                          static_cast<emulator::Schedule>(schedule)});
}

void emulated_plan_score_grad_sm80(const ScoreGrad& p, const Device& d, Plan* plan) {
  *plan = plan_of(&plan_sm80, p, d);
}
void emulated_plan_score_grad_sm90(const ScoreGrad& p, const Device& d, Plan* plan) {
  *plan = plan_of(&plan_sm90, p, d);
}

void emulated_decode_cut(const Product& p, const Device& d, int* cut) {
  const DecodeCut found = decode_cut(p, d, true);
  cut[0] = 1 << found.slice_bits, cut[1] = found.parts, cut[2] = found.part_units, cut[3] = found.slab_units;
  cut[4] = 1 << found.cluster_bits, cut[5] = found.features();
}

bool emulated_decodes(const Product& p, const Device& d) { return decodes(p, d); }

void emulated_rates(int capability, double* rates) {
  const Rates found = rates_of(capability);
  rates[0] = found.multiply_adds, rates[1] = found.memory, rates[2] = found.launch, rates[3] = found.l2;
}

// Python checks its copies of the structs with these.
int64_t emulated_size_of_product() { return sizeof(Product); }
int64_t emulated_size_of_score_grad() { return sizeof(ScoreGrad); }
int64_t emulated_size_of_select() { return sizeof(Select); }
int64_t emulated_size_of_pack_mask() { return sizeof(PackMask); }
int64_t emulated_size_of_pack_signs() { return sizeof(PackSigns); }
int64_t emulated_size_of_device() { return sizeof(Device); }
int64_t emulated_size_of_plan() { return sizeof(Plan); }
}
