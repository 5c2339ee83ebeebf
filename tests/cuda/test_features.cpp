// Feature maps and norms of kernels against their definitions in double, gradients against slopes; then dtypes and
// layouts against each other.
#include <doctest/doctest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "features/features.hpp"
#include "problems.hpp"

using namespace fwp;
using problems::Array;
using Numbers = std::vector<double>;

namespace {

struct Case {
  Features f;
  Numbers projection;
};

Case make(Map map, Norm norm, int64_t n, int64_t nu = 1, int64_t directions = 0, double eps = 0) {
  Case c;
  c.f.map = map;
  c.f.norm = norm;
  c.f.inputs = n;
  c.f.nu = map == Map::dpfp ? nu : 0;
  c.f.directions = map == Map::favor ? directions : 0;
  c.f.outputs = map == Map::dpfp ? 2 * n * nu : map == Map::favor ? 2 * directions : n;
  c.f.projection_stride = n + 3;
  const double m = static_cast<double>(directions);
  c.f.log_factor = -std::log(2 * m) / 2;
  c.f.floor = eps / std::sqrt(2 * m);
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  c.projection.resize(static_cast<size_t>(c.f.directions * c.f.projection_stride), problems::kNaN);
  for (int64_t i = 0; i < c.f.directions; ++i)
    for (int64_t d = 0; d < n; ++d) c.projection[static_cast<size_t>(i * c.f.projection_stride + d)] = normal(random);
  return c;
}

std::string name(const Case& c) {
  return "map " + std::to_string(static_cast<int>(c.f.map)) + " norm " + std::to_string(static_cast<int>(c.f.norm)) +
         " inputs " + std::to_string(c.f.inputs) + " outputs " + std::to_string(c.f.outputs);
}

// The definition, for one row.
Numbers image(const Case& c, const Numbers& x) {
  const size_t n = x.size();
  Numbers y;
  double sum = 0;
  switch (c.f.map) {
    case Map::none:
      y = x;
      break;
    case Map::relu:
      for (double a : x) y.push_back(a < 0 ? 0 : a);
      break;
    case Map::elu1:
      for (double a : x) y.push_back(a > 0 ? a + 1 : std::exp(a));
      break;
    case Map::softmax:
      for (double a : x) sum += std::exp(a);
      for (double a : x) y.push_back(std::exp(a) / sum);
      break;
    case Map::dpfp: {
      Numbers r;
      for (double a : x) r.push_back(a < 0 ? 0 : a);
      for (double a : x) r.push_back(a > 0 ? 0 : -a);
      for (size_t j = 1; j <= static_cast<size_t>(c.f.nu); ++j)
        for (size_t i = 0; i < 2 * n; ++i) y.push_back(r[i] * r[(i + 2 * n - j) % (2 * n)]);
      break;
    }
    case Map::favor: {
      double squares = 0;
      for (double a : x) squares += a * a;
      for (int sign : {1, -1})
        for (int64_t i = 0; i < c.f.directions; ++i) {
          double along = 0;
          for (size_t d = 0; d < n; ++d)
            along += c.projection[static_cast<size_t>(i * c.f.projection_stride) + d] * x[d];
          y.push_back(std::exp(sign * along - squares / 2 + c.f.log_factor) + c.f.floor);
        }
    }
  }
  double norm = 0;
  for (double a : y) norm += c.f.norm == Norm::sum ? a : a * a;
  if (c.f.norm == Norm::l2) norm = std::sqrt(norm);
  if (c.f.norm != Norm::none)
    for (double& a : y) a = norm == 0 ? 0 : a / norm;
  return y;
}

struct Tensor {
  Array array;
  Rows rows;
  int64_t begin;
};

// [B,T,heads,n], heads before tokens in memory, with gaps that stay NaN.
Tensor tensor(DType dtype, const cuda::features::Shape& s, int64_t n, int64_t gap) {
  Tensor x;
  x.begin = gap;
  x.rows.dtype = dtype;
  x.rows.t = n + gap;
  x.rows.h = s.T * x.rows.t + gap;
  x.rows.b = s.heads * x.rows.h + gap;
  x.array = Array(dtype, x.begin + s.B * x.rows.b);
  x.rows.data = static_cast<char*>(x.array.data()) + x.begin * item_size(dtype);
  return x;
}

struct Run {
  Case c;
  cuda::features::Shape shape;
  DType dtype, wide;
  Tensor x, y, dy, dx;
  Array projection;

  Run(const Case& of, cuda::features::Shape s, DType type, DType image_type, int64_t gap, double size = 1)
      : c(of),
        shape(s),
        dtype(type),
        wide(accumulation(type)),
        x(tensor(type, s, of.f.inputs, gap)),
        y(tensor(image_type, s, of.f.outputs, gap)),
        dy(tensor(image_type, s, of.f.outputs, gap)),
        dx(tensor(type, s, of.f.inputs, gap)),
        projection(wide, static_cast<int64_t>(of.projection.size())) {
    for (int64_t i = 0; i < projection.count(); ++i) projection.set(i, c.projection[static_cast<size_t>(i)]);
    for (double& value : c.projection) value = projection.get(&value - c.projection.data());
    c.f.projection = projection.data();
    std::mt19937 random(3);
    std::normal_distribution<double> normal;
    for_rows([&](int64_t b, int64_t t, int64_t h) {
      for (int64_t i = 0; i < c.f.inputs; ++i) x.array.set(at(x, b, t, h) + i, size * normal(random));
      for (int64_t i = 0; i < c.f.outputs; ++i) dy.array.set(at(dy, b, t, h) + i, normal(random));
    });
  }

  void forward() {
    problems::Workspace workspace(cuda::features::workspace(c.f, wide, 0, false));
    cuda::Queue queue(nullptr, "test", memory(workspace));
    cuda::features::forward(c.f, shape, x.rows, y.rows, workspace.data(), queue);
  }
  void backward() {
    problems::Workspace workspace(cuda::features::workspace(c.f, wide, 0, true));
    cuda::Queue queue(nullptr, "test", memory(workspace));
    cuda::features::backward(c.f, shape, dy.rows, x.rows, dx.rows, workspace.data(), queue);
  }

  template <class F>
  void for_rows(const F& f) const {
    for (int64_t b = 0; b < shape.B; ++b)
      for (int64_t h = 0; h < shape.heads; ++h)
        for (int64_t t = 0; t < shape.T; ++t) f(b, t, h);
  }
  static int64_t at(const Tensor& of, int64_t b, int64_t t, int64_t h) {
    return of.begin + b * of.rows.b + t * of.rows.t + h * of.rows.h;
  }
  static Numbers row(const Tensor& of, int64_t b, int64_t t, int64_t h, int64_t n) {
    Numbers numbers;
    for (int64_t i = 0; i < n; ++i) numbers.push_back(of.array.get(at(of, b, t, h) + i));
    return numbers;
  }
  Numbers all(const Tensor& of, int64_t n) const {
    Numbers numbers;
    for_rows([&](int64_t b, int64_t t, int64_t h) {
      for (double value : row(of, b, t, h, n)) numbers.push_back(value);
    });
    return numbers;
  }

 private:
  std::vector<cuda::Memory> memory(problems::Workspace& workspace) {
    std::vector<cuda::Memory> memory = {workspace.memory()};
    const auto add = [&memory](Array& a, bool writable) {
      memory.push_back({a.data(), static_cast<size_t>(a.count() * item_size(a.dtype())), writable});
    };
    add(x.array, false);
    add(dy.array, false);
    add(projection, false);
    add(y.array, true);
    add(dx.array, true);
    return memory;
  }
};

double distance(const Numbers& a, const Numbers& b) {
  REQUIRE(a.size() == b.size());
  double sum = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) != std::isnan(b[i])) return problems::kNaN;
    if (std::isnan(b[i])) continue;
    sum += (a[i] - b[i]) * (a[i] - b[i]);
    size += b[i] * b[i];
  }
  return std::sqrt(size == 0 ? sum : sum / size);
}

// Bit for bit; any NaN is NaN.
bool same(const Numbers& a, const Numbers& b) {
  bool equal = a.size() == b.size();
  for (size_t i = 0; equal && i < a.size(); ++i) equal = a[i] == b[i] || (std::isnan(a[i]) && std::isnan(b[i]));
  return equal;
}

Numbers expected(const Run& run) {
  Numbers y;
  run.for_rows([&](int64_t b, int64_t t, int64_t h) {
    for (double value : image(run.c, Run::row(run.x, b, t, h, run.c.f.inputs))) y.push_back(value);
  });
  return y;
}

// Slopes of <dy, image> along each number of x.
Numbers slopes(const Run& run) {
  constexpr double step = 1e-6;
  Numbers dx;
  run.for_rows([&](int64_t b, int64_t t, int64_t h) {
    Numbers x = Run::row(run.x, b, t, h, run.c.f.inputs);
    const Numbers dy = Run::row(run.dy, b, t, h, run.c.f.outputs);
    for (double& xi : x) {
      const double kept = xi;
      double slope = 0;
      for (int side : {1, -1}) {
        xi = kept + side * step;
        const Numbers y = image(run.c, x);
        for (size_t i = 0; i < y.size(); ++i) slope += side * dy[i] * y[i];
      }
      xi = kept;
      dx.push_back(slope / (2 * step));
    }
  });
  return dx;
}

std::vector<Case> cases(int64_t n) {
  std::vector<Case> all;
  for (Norm norm : {Norm::none, Norm::sum, Norm::l2}) {
    for (Map map : {Map::none, Map::relu, Map::elu1, Map::softmax}) all.push_back(make(map, norm, n));
    all.push_back(make(Map::dpfp, norm, n, n < 2 ? 1 : 3));
    all.push_back(make(Map::favor, norm, n, 0, n + 2));
    all.push_back(make(Map::favor, norm, n, 0, 5, 1e-3));
  }
  return all;
}

}  // namespace

TEST_CASE("features and gradients are those of the definition, in any order of threads") {
  for (const char* order : {"forward", "reverse", "random"}) {
    const problems::Emulator emulator(true, order);
    for (const int64_t n : {1, 5, 33})
      for (const Case& c : cases(n)) {
        if (n == 1 && c.f.norm == Norm::sum && c.f.map == Map::none) continue;  // a constant
        CAPTURE(name(c));
        Run run(c, {1, 3, 2}, DType::f64, DType::f64, 2);
        run.forward();
        run.backward();
        CHECK(distance(run.all(run.y, c.f.outputs), expected(run)) < 1e-13);
        const Numbers slope = slopes(run);
        double size = 1;
        for (double s : slope) size = std::max(size, std::fabs(s));
        const Numbers dx = run.all(run.dx, c.f.inputs);
        for (size_t i = 0; i < dx.size(); ++i) CHECK(std::fabs(dx[i] - slope[i]) < 1e-6 * size);
      }
  }
}

TEST_CASE("float32 features and gradients") {
  const problems::Emulator emulator(false);
  for (const int64_t n : {1, 7, 32, 64, 100})
    for (const Case& c : cases(n)) {
      if (n == 1 && c.f.norm == Norm::sum && c.f.map == Map::none) continue;
      CAPTURE(name(c));
      Run run(c, {2, 5, 3}, DType::f32, DType::f32, 0, 0.5), exact(c, {2, 5, 3}, DType::f64, DType::f64, 0, 0.5);
      for (int64_t i = 0; i < run.x.array.count(); ++i) exact.x.array.set(i, run.x.array.get(i));
      for (int64_t i = 0; i < run.dy.array.count(); ++i) exact.dy.array.set(i, run.dy.array.get(i));
      for (Run* each : {&run, &exact}) {
        each->forward();
        each->backward();
      }
      // A sum of numbers of both signs may cancel.
      const bool cancels = c.f.map == Map::none && c.f.norm == Norm::sum;
      CHECK(distance(run.all(run.y, c.f.outputs), exact.all(exact.y, c.f.outputs)) < (cancels ? 1e-4 : 2e-6));
      CHECK(distance(run.all(run.dx, n), exact.all(exact.dx, n)) < (cancels ? 1e-3 : 4e-6));
    }
}

TEST_CASE("halves are float32 rounded once, whatever the layout") {
  const problems::Emulator emulator(true, "random");
  for (const DType half : {DType::f16, DType::bf16})
    for (const Case& c : cases(9)) {
      CAPTURE(name(c));
      Run narrow(c, {2, 5, 3}, half, half, 3), wide(c, {2, 5, 3}, DType::f32, DType::f32, 0),
          mixed(c, {2, 5, 3}, half, DType::f32, 1);
      wide.for_rows([&](int64_t b, int64_t t, int64_t h) {
        for (int64_t i = 0; i < c.f.inputs; ++i)
          wide.x.array.set(Run::at(wide.x, b, t, h) + i, narrow.x.array.get(Run::at(narrow.x, b, t, h) + i));
        for (int64_t i = 0; i < c.f.outputs; ++i)
          for (Run* each : {&wide, &mixed})
            each->dy.array.set(Run::at(each->dy, b, t, h) + i, narrow.dy.array.get(Run::at(narrow.dy, b, t, h) + i));
      });
      for (Run* each : {&narrow, &wide, &mixed}) {
        each->forward();
        each->backward();
      }
      const auto rounded = [half](Numbers x) {
        Array one(half, 1);
        for (double& value : x) {
          one.set(0, value);
          value = one.get(0);
        }
        return x;
      };
      const Numbers y = wide.all(wide.y, c.f.outputs), dx = rounded(wide.all(wide.dx, c.f.inputs));
      CHECK(same(narrow.all(narrow.y, c.f.outputs), rounded(y)));
      CHECK(same(mixed.all(mixed.y, c.f.outputs), y));
      CHECK(same(narrow.all(narrow.dx, c.f.inputs), dx));
      CHECK(same(mixed.all(mixed.dx, c.f.inputs), dx));
    }
}

TEST_CASE("a row does not know of the others") {
  const problems::Emulator emulator(false);
  for (const Case& c : cases(6)) {
    CAPTURE(name(c));
    Run all(c, {3, 17, 2}, DType::f32, DType::f32, 0), one(c, {1, 1, 1}, DType::f32, DType::f32, 0);
    all.x.array.set(Run::at(all.x, 2, 3, 1), problems::kNaN);
    all.forward();
    all.backward();
    all.for_rows([&](int64_t b, int64_t t, int64_t h) {
      if (t % 5 != 3) return;
      for (int64_t i = 0; i < c.f.inputs; ++i) one.x.array.set(i, all.x.array.get(Run::at(all.x, b, t, h) + i));
      for (int64_t i = 0; i < c.f.outputs; ++i) one.dy.array.set(i, all.dy.array.get(Run::at(all.dy, b, t, h) + i));
      one.forward();
      one.backward();
      CHECK(same(one.all(one.y, c.f.outputs), Run::row(all.y, b, t, h, c.f.outputs)));
      CHECK(same(one.all(one.dx, c.f.inputs), Run::row(all.dx, b, t, h, c.f.inputs)));
      const bool has_nan = b == 2 && t == 3 && h == 1, constant = c.f.map == Map::none && c.f.norm == Norm::none;
      for (double value : one.all(one.y, c.f.outputs)) CHECK((has_nan || std::isfinite(value)));
      CHECK(std::isnan(one.all(one.y, c.f.outputs)[0]) == has_nan);
      CHECK(std::isnan(one.all(one.dx, c.f.inputs)[0]) == (has_nan && !constant));
    });
  }
}

TEST_CASE("rows without a norm become zeros, tiny and huge ones keep theirs") {
  for (const DType dtype : {DType::f32, DType::f64})
    for (const Norm norm : {Norm::sum, Norm::l2}) {
      Run run(make(Map::none, norm, 40), {1, 4, 1}, dtype, dtype, 0);
      const double tiny = dtype == DType::f64 ? 1e-300 : 1e-37, huge = dtype == DType::f64 ? 1e300 : 1e36;
      for (int64_t i = 0; i < 40; ++i) {
        run.x.array.set(i, 0);
        run.x.array.set(40 + i, i < 8 ? tiny : 0);
        run.x.array.set(80 + i, i < 8 ? huge : 0);
        run.x.array.set(120 + i, i % 2 == 0 ? 1 : -1);
      }
      run.forward();
      run.backward();
      const double of_eight = norm == Norm::sum ? 1 / 8.0 : 1 / std::sqrt(8.0);
      const Numbers y = run.all(run.y, 40), dx = run.all(run.dx, 40);
      for (size_t i = 0; i < 40; ++i) {
        CHECK(y[i] == 0);
        CHECK(dx[i] == 0);
        CHECK(y[40 + i] == doctest::Approx(i < 8 ? of_eight : 0));
        CHECK(y[80 + i] == doctest::Approx(i < 8 ? of_eight : 0));
        CHECK(std::fabs(y[120 + i]) == doctest::Approx(norm == Norm::sum ? 0 : 1 / std::sqrt(40.0)));
        CHECK(std::isfinite(dx[80 + i]));
      }
    }
}

TEST_CASE("FAVOR+ before a norm is taken at the size of its largest feature") {
  Run run(make(Map::favor, Norm::sum, 16, 0, 8), {1, 2, 1}, DType::f32, DType::f32, 0, 12);  // exp(-|x|^2/2) is 0
  run.forward();
  run.backward();
  for (int64_t t = 0; t < 2; ++t) {
    double sum = 0;
    for (double value : Run::row(run.y, 0, t, 0, 16)) sum += value;
    CHECK(sum == doctest::Approx(1));
    for (double value : Run::row(run.dx, 0, t, 0, 16)) CHECK(std::isfinite(value));
  }
}

TEST_CASE("nothing to do, and much") {
  for (const Map map : {Map::relu, Map::softmax, Map::dpfp, Map::favor}) {
    Run no_rows(make(map, Norm::l2, 4, 2, 3), {0, 3, 2}, DType::f32, DType::f32, 0);
    no_rows.forward();
    no_rows.backward();
    Run no_numbers(make(map, Norm::l2, 0, 1, 3), {2, 3, 2}, DType::f32, DType::f32, 0);
    no_numbers.forward();
    no_numbers.backward();
    for (double value : no_numbers.all(no_numbers.y, no_numbers.c.f.outputs))
      CHECK(value == doctest::Approx(1 / std::sqrt(6.0)));
  }
  Run large(make(Map::dpfp, Norm::none, 1000, 3), {1, 1, 1}, DType::f32, DType::f32, 0);
  large.forward();
  CHECK(distance(large.all(large.y, 6000), expected(large)) < 1e-6);
  Run larger(make(Map::dpfp, Norm::none, 6000, 1), {1, 1, 1}, DType::f32, DType::f32, 0);
  larger.forward();
  CHECK(distance(larger.all(larger.y, 12000), expected(larger)) < 1e-6);
}

TEST_CASE("rows that are too large for shared memory are worked on in the workspace, to the same bits") {
  const problems::Emulator emulator(true, "random");
  const auto compare = [](const Case& c, cuda::features::Shape shape) {
    CAPTURE(name(c));
    Run usual(c, shape, DType::bf16, DType::f32, 1), large(c, shape, DType::bf16, DType::f32, 1);
    usual.forward();
    usual.backward();
    const size_t bytes = cuda::emulated_shared_bytes;
    cuda::emulated_shared_bytes = 64;
    CHECK(cuda::features::workspace(c.f, DType::f32, 0, true) > 0);
    large.forward();
    large.backward();
    cuda::emulated_shared_bytes = bytes;
    CHECK(same(usual.all(usual.y, c.f.outputs), large.all(large.y, c.f.outputs)));
    CHECK(same(usual.all(usual.dx, c.f.inputs), large.all(large.dx, c.f.inputs)));
  };
  for (const Case& c : cases(33)) compare(c, {1, 3, 2});
  compare(make(Map::relu, Norm::l2, 3), {3, 50, 2});  // more rows than warps
}
