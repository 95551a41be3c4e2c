// Table of contents: every op of the namespace `bdprune`, with its shapes. Kernels are registered at the end of the
// files with their names (csrc/cpu/*.cpp, csrc/cuda/*.cu); fake kernels and autograd are in bdprune/ops/.
//
// [..., *] has any number of trailing axes, "floating" is float16, bfloat16, float32 or float64, and G is the number of
// models in a stack.
#include "common.h"

STABLE_TORCH_LIBRARY(bdprune, m)
{
  // Largest singular value of each filter, which is a matrix [I, kh * kw].
  //   weights: list of [O, I], [O, I, kh, kw] or [G, O, I, kh, kw], floating
  //   scales:  one entry per weight, None or floating [O] or [G, O]; the norm is multiplied by |scale|
  //   returns: all norms in the order of the list, [sum of O or G * O]; float64 if any weight is, else float32
  m.def("filter_spectral_norms(Tensor[] weights, Tensor?[] scales) -> Tensor");

  // Adds one batch to the running moments of the channels of x, with P = product of the trailing sizes.
  //   cross:        float64 [C, C] += sum over samples and positions of (x - shift)(x - shift)^T, both triangles
  //   sum:          float64 [C]    += sum over samples and positions of (x - shift)
  //   norm_sum:     float64 [C]    += sum over samples of |x[n, c]|_2 / sqrt(P), of the unshifted x
  //   x:            [N, C, *], floating
  //   shift:        float64 [C], representable in float32 unless x is float64
  //   tensor_cores: on CUDA, each float32 product as three TF32 products; ignored on the CPU and for float64
  // For a stack, all these shapes start with G.
  m.def(
      "channel_moments_update_(Tensor(a!) cross, Tensor(b!) sum, Tensor(c!) norm_sum, Tensor x, Tensor shift, bool "
      "tensor_cores=False) -> ()");

  // mask[c] * z[:, c] for every channel c.
  //   z:       [N, C, *] or, in a stack, [G, N, C, *], floating
  //   mask:    [C] or [G, C], floating
  //   returns: in z's dtype and, if z is dense, in z's layout
  m.def("channel_scale(Tensor z, Tensor mask) -> Tensor");

  // Its backward, in one pass over grad and z.
  //   grad, z: [N, C, *] or [G, N, C, *]
  //   returns: mask * grad in z's dtype, and the sum of grad * z per channel in mask's dtype and shape; an output that
  //            is not needed is an empty [0]
  m.def("channel_scale_backward(Tensor grad, Tensor z, Tensor mask, bool need_z, bool need_mask) -> (Tensor, Tensor)");

  // Stamps H triggers onto N of M images each: (1 - mask) * image + mask * pattern, or the sum of image and pattern
  // clipped to [0, 1] without masks.
  //   images:   [M, C, h, w], floating
  //   masks:    [H, 1, h, w], floating
  //   patterns: [H, C, h, w], floating
  //   picks:    int64 [H, N], or None for all images. An index out of range is an IndexError on the CPU; on CUDA the
  //             stamped image is NaN, because a check would wait for the device.
  //   returns:  [H, N, C, h, w] in the dtype of the images and, seen as [H * N, C, h, w], in their layout
  m.def("stamp(Tensor images, Tensor? masks, Tensor patterns, Tensor? picks) -> Tensor");

  // Its backward.
  //   grad:    [H, N, C, h, w], in the dtype of the images
  //   returns: the gradients of the masks and of the patterns, in their dtypes and shapes; one that is not needed, or
  //            has no masks, is an empty [0]
  m.def(
      "stamp_backward(Tensor grad, Tensor images, Tensor? masks, Tensor patterns, Tensor? picks, bool need_masks, bool "
      "need_patterns) -> (Tensor, Tensor)");

  // A 3x3 convolution with stride 1 and padding 1 by Winograd's algorithm: CPU only, float32, channels_last out.
  //   x:       [N, I, H, W]
  //   weight:  [O, I, 3, 3]
  //   bias:    [O]
  //   returns: [N, O, H, W]
  m.def("winograd_conv2d(Tensor x, Tensor weight, Tensor? bias) -> Tensor");

  // The same times a mask [O].
  //   returns: the masked output, and the unmasked output if need_z, else [0]
  m.def("winograd_masked_conv2d(Tensor x, Tensor weight, Tensor mask, Tensor? bias, bool need_z) -> (Tensor, Tensor)");

  // The gradients of both from grad [N, O, H, W]: of the input [N, I, H, W], with the mask if there is one, and of the
  // weight [O, I, 3, 3], without a mask.
  m.def("winograd_conv2d_input_grad(Tensor grad, Tensor weight, Tensor? mask=None) -> Tensor");
  m.def("winograd_conv2d_weight_grad(Tensor grad, Tensor x) -> Tensor");

  // The masked convolutions of a stack in one launch: CUDA only; on the CPU bdprune.ops composes them.
  //   x:       [G, N, I, H, W], or one batch [N, I, H, W] for all models; float16, bfloat16 or float32
  //   weight:  [G, O, I / groups, kh, kw] of x's dtype, read in place; [1, O, ...] or expanded: shared by all models
  //   mask:    float32 [G, O]
  //   bias:    float32 [G, O]
  //   exact:   multiply in float32, not in TF32
  //   returns: [G, N, O, H', W'], and the unmasked output if need_z, else [0]; in x's dtype and layout
  m.def(
      "stacked_conv2d(Tensor x, Tensor weight, Tensor mask, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
      "int groups, bool need_z, bool exact) -> (Tensor, Tensor)");

  // Its backward: the gradients of the input and the mask.
  //   grad:    [G, N, O, H', W'], of the masked output
  //   z:       the unmasked output, if the mask's gradient is wanted
  //   returns: the gradient of the input [G, N, I, height, width], and that of the mask, sum of grad * z, float32
  //            [G, O], or [0] without z
  m.def(
      "stacked_conv2d_backward(Tensor grad, Tensor? z, Tensor weight, Tensor mask, int height, int width, int[] "
      "stride, int[] padding, int[] dilation, int groups, bool exact) -> (Tensor, Tensor)");
}
