// A row of q or k on its way into the recurrence, through a map and a norm, and its gradient on the way back.
#pragma once

namespace fwp {
namespace {

template <class Tile>
struct FeatureRow {
  using T = typename Tile::Scalar;
  const Features& f;
  T *x, *dx;          // [inputs]   a row, and its gradient
  T *y, *normalised;  // [outputs]  its image, before and after the norm; of both y alone without a norm
  T* work;            // [work_size]

  static int64_t work_size(const Features& f) { return f.map == Map::dpfp ? 8 * f.inputs : 3 * Tile::up(f.directions); }

  // The image of x.
  FWP_DEVICE void forward(T* to) const {
    map_fwd(to);
    if (f.norm != Norm::none) norm_fwd<Tile>(f.norm, to, f.outputs);
  }

  // From the gradient dy of the image of x, which is overwritten, dx.
  FWP_DEVICE void backward(T* dy) const {
    map_fwd(y);
    if (f.norm != Norm::none) {
      copy(y, normalised);
      norm_bwd<Tile>(f.norm, normalised, f.outputs, dy);
      Tile::fence();
    }
    map_bwd(dy);
  }

 private:
  FWP_DEVICE void map_fwd(T* to) const {
    switch (f.map) {
      case Map::none:
        return copy(x, to);
      case Map::relu:
        return relu_fwd<Tile>(x, f.inputs, to);
      case Map::elu1:
        return elu1_fwd<Tile>(x, f.inputs, to);
      case Map::softmax:
        return softmax_fwd<Tile>(x, f.inputs, to);
      case Map::dpfp:
        return dpfp_fwd<Tile>(x, f.inputs, f.nu, work, to);
      case Map::favor:
        return favor_fwd<Tile>(f, x, work, to);
    }
  }
  FWP_DEVICE void map_bwd(const T* dy) const {
    switch (f.map) {
      case Map::none:
        return copy(dy, dx);
      case Map::relu:
        return relu_bwd<Tile>(x, f.inputs, dy, dx);
      case Map::elu1:
        return elu1_bwd<Tile>(x, f.inputs, y, dy, dx);
      case Map::softmax:
        return softmax_bwd<Tile>(f.inputs, y, dy, dx);
      case Map::dpfp:
        return dpfp_bwd<Tile>(x, f.inputs, f.nu, work, dy, dx);
      case Map::favor:
        return favor_bwd<Tile>(f, x, work, dy, dx);
    }
  }

  // Of as many numbers as an image has.
  FWP_DEVICE void copy(const T* from, T* to) const {
    for (int64_t i = 0; i < f.outputs; i += Tile::kWidth) Tile::store(to + i, Tile::load_some(from + i, f.outputs - i));
  }
};

}  // namespace
}  // namespace fwp
