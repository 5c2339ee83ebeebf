#include "overlap.hpp"

#include <algorithm>
#include <numeric>

namespace fwp::core {
namespace {

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }
int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

// Items of a and b meet where sum_k c_k x_k falls in a window around b.first - a.first; x_k is an index of a, minus an
// index of b, or, for a stride that both have, their difference. A depth-first search from the largest stride down,
// pruned by what the smaller strides can still reach and by their common divisor, takes a few steps where strides nest.
class MeetingSearch {
 public:
  MeetingSearch(const Region& a, const Region& b) {
    for (int i = 0; i < a.rank; ++i) add(a.stride[i], 0, a.shape[i] - 1);
    for (int i = 0; i < b.rank; ++i) add(b.stride[i], 1 - b.shape[i], 0);
    std::sort(terms_, terms_ + count_, [](const Term& x, const Term& y) { return x.c > y.c; });
    for (int k = count_ - 1; k >= 0; --k) {
      reach_[k].low = reach_[k + 1].low + terms_[k].c * terms_[k].low;
      reach_[k].high = reach_[k + 1].high + terms_[k].c * terms_[k].high;
      reach_[k].divisor = std::gcd(reach_[k + 1].divisor, terms_[k].c);
    }
  }

  // Whether some choice of x puts the sum into [low, high]. True as well when the search grows too long.
  bool reaches(int64_t low, int64_t high, int k = 0) {
    if (k == count_) return low <= 0 && 0 <= high;
    if (--steps_ < 0) return true;
    if (floor_div(high, reach_[k].divisor) < ceil_div(low, reach_[k].divisor)) return false;
    const Term& term = terms_[k];
    const Reach& rest = reach_[k + 1];
    const int64_t from = std::max(term.low, ceil_div(low - rest.high, term.c));
    const int64_t to = std::min(term.high, floor_div(high - rest.low, term.c));
    for (int64_t x = from; x <= to; ++x)
      if (reaches(low - term.c * x, high - term.c * x, k + 1)) return true;
    return false;
  }

 private:
  struct Term {
    int64_t c, low, high;
  };
  struct Reach {
    int64_t low = 0, high = 0, divisor = 0;
  };

  void add(int64_t c, int64_t low, int64_t high) {
    if (c == 0) return;
    Term* same = std::find_if(terms_, terms_ + count_, [c](const Term& term) { return term.c == c; });
    if (same == terms_ + count_) terms_[count_++] = {c, 0, 0};
    same->low += low;
    same->high += high;
  }

  Term terms_[2 * kMaxRank];
  Reach reach_[2 * kMaxRank + 1];
  int count_ = 0;
  int steps_ = 10000;
};

}  // namespace

bool overlap(const Region& a, const Region& b) {
  if (a.item == 0 || b.item == 0 || a.end <= b.first || b.end <= a.first) return false;
  const int64_t shift =
      a.first < b.first ? static_cast<int64_t>(b.first - a.first) : -static_cast<int64_t>(a.first - b.first);
  return MeetingSearch(a, b).reaches(shift - a.item + 1, shift + b.item - 1);
}

bool overlaps_itself(const Region& a) {
  for (int i = 0; i < a.rank; ++i) {
    int64_t extent = a.item;  // of the axes that nest inside axis i
    for (int j = 0; j < a.rank; ++j)
      if (a.stride[j] < a.stride[i] || (a.stride[j] == a.stride[i] && j < i)) extent += a.stride[j] * (a.shape[j] - 1);
    if (a.stride[i] < extent) return true;
  }
  return false;
}

}  // namespace fwp::core
