// Strings among the arguments of an operation.
#pragma once

#include <string>

namespace dspa::binding {

// A string that an operation is called with. torch's own conversion to std::string (2.10 to 2.13, at least) allocates one
// on the heap with each call and never frees it.
struct Word {
  std::string text;
  operator const std::string&() const { return text; }
};

}  // namespace dspa::binding

namespace torch::stable::detail {

template <>
struct ToImpl<dspa::binding::Word> {
  static dspa::binding::Word call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    size_t length = 0;
    const char* text = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
    dspa::binding::Word word{std::string(text, length)};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return word;
  }
};

}  // namespace torch::stable::detail
