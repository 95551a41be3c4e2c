// A check that throws std::runtime_error with what was wrong.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

namespace bdprune {

template <typename Part>
std::string as_text(const Part& part) {
  if constexpr (std::is_arithmetic_v<Part>) {
    return std::to_string(part);
  } else {
    return part;
  }
}

template <typename... Parts>
[[noreturn]] void fail(const char* file, int line, const Parts&... parts) {
  throw std::runtime_error((as_text(parts) + ...) + " (" + file + ":" + std::to_string(line) + ")");
}

}  // namespace bdprune

// A backstop: the Python layer has checked its arguments and says more about what was wrong.
//
// It stands in for STD_TORCH_CHECK, which writes its message through iostreams: with torch 2.11 and gcc 13.3 a process
// crashed in it where it should have thrown.
#define BDP_CHECK(condition, ...)                                       \
  do {                                                                  \
    if (!(condition)) ::bdprune::fail(__FILE__, __LINE__, __VA_ARGS__); \
  } while (false)
