// The number formats of maps and weights.
#pragma once

namespace bdprune::core {

enum class Dtype { kFloat, kDouble, kHalf, kBFloat16 };

}  // namespace bdprune::core
