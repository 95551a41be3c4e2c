// A check that throws std::runtime_error with a description of the failure.
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

// A second line of defence: the Python layer checks its arguments first, with better messages.
//
// Replaces STD_TORCH_CHECK, which formats its message with iostreams: with torch 2.11 and gcc 13.3 it crashed a process
// where it should have thrown.
#define BDP_CHECK(condition, ...)                                       \
  do {                                                                  \
    if (!(condition)) ::bdprune::fail(__FILE__, __LINE__, __VA_ARGS__); \
  } while (false)
