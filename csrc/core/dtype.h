// The number formats that maps and weights come in.
#pragma once

namespace bdprune::core {

enum class Dtype { kFloat, kDouble, kHalf, kBFloat16 };

}  // namespace bdprune::core
