// What is done to every row of q and k before the recurrence: a feature map phi, then a normalisation. Plain numbers.
#pragma once

namespace fwp {

enum class Map : int { none, relu, elu1, softmax, dpfp, favor };
enum class Norm : int { none, sum, l2 };

struct Features {
  Map map = Map::none;
  Norm norm = Norm::none;
  int64_t inputs = 0;      // size of a row
  int64_t outputs = 0;     // of its image: K of the recurrence
  int64_t nu = 0;          // DPFP
  int64_t directions = 0;  // FAVOR+: rows of the projection [directions][inputs], of the accumulation type
  const void* projection = nullptr;
  int64_t projection_stride = 0;     // from row to row, in numbers
  double log_factor = 0, floor = 0;  // FAVOR+: -ln(2m)/2 and eps/sqrt(2m)

  constexpr bool active() const { return map != Map::none || norm != Norm::none; }
  // FAVOR+ before a normalisation may be of any size, and is taken at that of its largest feature: none underflows.
  constexpr bool scale_free() const { return norm != Norm::none && floor == 0; }
};

}  // namespace fwp
