// A string argument of an op.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>

namespace mft {

// torch's own conversion to std::string (stableivalue_conversions.h, torch 2.10 to 2.13) makes one on the heap that nobody
// frees, 48 bytes per argument and call. The conversion to this type, below, frees what it is given and makes nothing.
struct Text : std::string {
  using std::string::string;
};

}  // namespace mft

namespace torch::stable::detail {

template <>
struct ToImpl<mft::Text> {
  static mft::Text call(StableIValue value, uint64_t /*extension_build_version*/, bool /*is_internal*/) {
    const StringHandle handle = to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    mft::Text text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

}  // namespace torch::stable::detail
