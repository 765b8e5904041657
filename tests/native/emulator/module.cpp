// The drivers as the Python module `emulated`. 16-bit floats travel as uint16.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "drivers.h"

namespace py = pybind11;
using drivers::Dtype;
using drivers::i64;
using drivers::Setting;

namespace {

Dtype dtype_of(const py::array& x, bool bf16) {
  if (x.itemsize() == 8) return Dtype::Fp64;
  if (x.itemsize() == 4) return Dtype::Fp32;
  return bf16 ? Dtype::Bf16 : Dtype::Fp16;
}

std::array<double, 3> cosine(const py::array& x, const py::array& y, bool bf16, i64 pad, i64 shift, unsigned seed) {
  return drivers::cosine(dtype_of(x, bf16), x.data(), y.data(), x.shape(0), x.shape(1), {pad, shift, seed, 0, 0});
}

void gram(py::array gram, py::array mean, const py::array& x, i64 group, int extra_bits, bool bf16, i64 pad, i64 shift,
          unsigned seed) {
  drivers::gram(dtype_of(x, bf16), x.data(), x.shape(0), x.shape(1), gram.itemsize() == 8, gram.mutable_data(),
                mean.mutable_data(), {pad, shift, seed, group, extra_bits});
}

i64 scan(const py::array& a, bool upper, i64 shift, unsigned seed) {
  return drivers::scan(a.itemsize() == 8, a.data(), a.shape(0), a.shape(2), a.shape(1), upper, {0, shift, seed, 0, 0});
}

void transpose(const py::array& source, py::array target, i64 shift, unsigned seed) {
  drivers::transpose(source.itemsize() == 8, source.data(), source.shape(0), target.mutable_data(),
                     {0, shift, seed, 0, 0});
}

std::pair<std::vector<i64>, double> topk(std::vector<double> value, std::vector<i64> cost, std::vector<i64> dense_cost,
                                         std::vector<i64> offsets, i64 budget, i64 min_rank, i64 multiple_of,
                                         bool pivoted, bool fp64, unsigned seed) {
  const drivers::Ranks result = drivers::topk({std::move(value), std::move(cost), std::move(dense_cost),
                                               std::move(offsets), budget, min_rank, multiple_of, pivoted},
                                              fp64, seed);
  return {result.ranks, result.threshold};
}

}  // namespace

PYBIND11_MODULE(emulated, m) {
  const auto layout = [](auto... rest) {
    return std::make_tuple(rest..., py::kw_only(), py::arg("bf16") = false, py::arg("pad") = 0, py::arg("shift") = 0,
                           py::arg("seed") = 0);
  };
  std::apply([&](const auto&... a) { m.def("cosine", &cosine, a...); }, layout(py::arg("x"), py::arg("y")));
  std::apply([&](const auto&... a) { m.def("gram", &gram, a...); },
             layout(py::arg("gram"), py::arg("mean"), py::arg("x"), py::arg("group") = 0, py::arg("extra_bits") = 0));
  m.def("scan", &scan, py::arg("a"), py::arg("upper"), py::kw_only(), py::arg("shift") = 0, py::arg("seed") = 0);
  m.def("transpose", &transpose, py::arg("source"), py::arg("target"), py::kw_only(), py::arg("shift") = 0,
        py::arg("seed") = 0);
  m.def("topk", &topk, py::arg("value"), py::arg("cost"), py::arg("dense_cost"), py::arg("offsets"), py::arg("budget"),
        py::arg("min_rank"), py::arg("multiple_of"), py::arg("pivoted") = false, py::kw_only(), py::arg("fp64") = true,
        py::arg("seed") = 0);
  m.def("widen", [](const std::vector<std::uint16_t>& bits, bool bf16) {
    return drivers::widened(bf16 ? Dtype::Bf16 : Dtype::Fp16, bits);
  });
  m.def("probe", &drivers::probe, py::arg("name"), py::arg("seed") = 0);
}
