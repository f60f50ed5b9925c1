// Error messages: one sentence that names the function, the argument, what was expected, what came.
// std::invalid_argument becomes ValueError in Python, std::runtime_error RuntimeError (pybind11
// does that), TypeError TypeError (bindings.cpp does).
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace gradfuse {

struct TypeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws E with the arguments streamed into its message.
template <class E, class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw E(message.str());
}

}  // namespace gradfuse
