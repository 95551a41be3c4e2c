// Stamps triggers onto images, and its backward: the torch-free part of stamp.
//
// The work is divided into tiles. A tile is one trigger at the positions [begin, end) of all its images and all their
// channels, so every gradient is a sum within one tile. The type to compute in is double for images of doubles,
// otherwise float.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace bdprune::core {

// The distances of two channels and of two positions of an image: (positions, 1) or (1, channels).
struct ImageStrides {
  int64_t channel, position;
};

// The arguments of both directions. Masks and patterns are in the type to compute in.
struct Stamps {
  Dtype dtype;  // of the images and of what is stamped
  int64_t channels, positions;
  ImageStrides image, pattern;
  const void* images;    // [M, channels, positions]
  const int64_t* picks;  // [H, count], the images of each trigger, or null for the images [0, count)
  int64_t count;
  const void* masks;     // [H, positions], or null for additive triggers
  const void* patterns;  // [H, channels, positions]
};

struct StampTile {
  int64_t trigger, begin, end;
};

// Bytes of scratch for a tile of this many elements per image. One scratch serves any number of tiles, in turn.
int64_t stamp_scratch_bytes(int64_t elements);

// out [H, count, channels, positions] = the stamped images, with the strides of the images.
void stamp(const Stamps& stamps, const StampTile& tile, void* out, void* scratch);

// The gradients of masks and patterns, in their type and strides, from the gradient of the stamped images; null if not
// needed. A sum runs over the images in order, in double; of float images, four at a time are first summed in float.
void stamp_backward(const Stamps& stamps, const StampTile& tile, const void* grad, void* grad_masks,
                    void* grad_patterns, void* scratch);

}  // namespace bdprune::core
