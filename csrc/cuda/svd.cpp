#include "cuda/solver.h"
#include "cuda/solver_batch.h"

namespace unirank::cuda::solver {
namespace {

using i64 = std::int64_t;

constexpr cusolverEigMode_t kVectors = CUSOLVER_EIG_MODE_VECTOR;
constexpr int kThin = 1;

// One SVD call: the shape, the arrays, and a method of each cuSOLVER routine. Every routine destroys its input,
// so each works on a copy, and `a` stays for a second attempt and for error messages.
template <typename T>
class Svd {
 public:
  Svd(const Call& call, i64 B, i64 m, i64 n, const T* a, T* s, T* left, T* right)
      : call_(call),
        handle_(thread_handle(call)),
        B_(B),
        m_(m),
        n_(n),
        a_(a),
        s_(s),
        left_(left),
        right_(right),
        info_(allocate<int>(call, B)),
        outcome_(B, n) {}

  void run() {
    if (m_ <= kJacobiBatchedSide && n_ <= kJacobiBatchedSide) {
      jacobi_batched();
      outcome_.read(call_, info_, s_);
    } else {
      polar();
      outcome_.read(call_, info_, s_);
      repair();
    }
    check_outcome(call_, outcome_, a_, m_, n_, [](i64, i64) { return true; });
  }

 private:
  static constexpr i64 kSize = sizeof(T);

  int m() const { return static_cast<int>(m_); }
  int n() const { return static_cast<int>(n_); }

  // The Jacobi routine for small batches knows no thin form: left vectors come as m x m and lose their last columns.
  void jacobi_batched() {
    const JacobiInfo jacobi_info(call_);
    T* input = allocate<T>(call_, B_ * m_ * n_);
    copy_on_device(call_, input, a_, B_ * m_ * n_);
    T* full = m_ == n_ ? left_ : allocate<T>(call_, B_ * m_ * m_);
    in_chunks(B_, chunk_length(m_ * m_ * kSize), [&](i64 first, i64 count) {
      T *x = input + first * m_ * n_, *u = full + first * m_ * m_, *v = right_ + first * n_ * n_, *s = s_ + first * n_;
      const int batch = static_cast<int>(count);
      int length = 0;
      check(call_,
            Api<T>::gesvdj_batched_size(handle_, kVectors, m(), n(), x, m(), s, u, m(), v, n(), &length, jacobi_info,
                                        batch),
            "cusolverDn*gesvdjBatched_bufferSize", {first, count});
      T* work = legacy_workspace<T>(call_, length, "cusolverDn*gesvdjBatched");
      check(call_,
            Api<T>::gesvdj_batched(handle_, kVectors, m(), n(), x, m(), s, u, m(), v, n(), work, length, info_ + first,
                                   jacobi_info, batch),
            "cusolverDn*gesvdjBatched", {first, count});
    });
    if (m_ != n_) {
      const std::size_t row = sizeof(T) * static_cast<std::size_t>(m_);
      check(call_,
            cudaMemcpy2DAsync(left_, row * n_, full, row * m_, row * n_, static_cast<std::size_t>(B_),
                              cudaMemcpyDeviceToDevice, call_.stream),
            "cudaMemcpy2DAsync");
    }
  }

  void jacobi(const std::vector<i64>& matrices) {
    const JacobiInfo jacobi_info(call_);
    T* input = single_input();
    int length = 0;
    check(call_,
          Api<T>::gesvdj_size(handle_, kVectors, kThin, m(), n(), input, m(), s_, left_, m(), right_, n(), &length,
                              jacobi_info),
          "cusolverDn*gesvdj_bufferSize");
    T* work = legacy_workspace<T>(call_, length, "cusolverDn*gesvdj");
    for (const i64 b : matrices) {
      copy_on_device(call_, input, a_ + b * m_ * n_, m_ * n_);
      check(call_,
            Api<T>::gesvdj(handle_, kVectors, kThin, m(), n(), input, m(), s_ + b * n_, left_ + b * m_ * n_, m(),
                           right_ + b * n_ * n_, n(), work, length, info_ + b, jacobi_info),
            "cusolverDn*gesvdj", {b, 1});
    }
  }

  void polar() {
    const Params params(call_);
    constexpr auto type = Api<T>::type;
    T* input = single_input();
    perturbation_.assign(static_cast<std::size_t>(B_), 0);
    std::size_t device_bytes = 0, host_bytes = 0;
    check(call_,
          cusolverDnXgesvdp_bufferSize(handle_, params, kVectors, kThin, m_, n_, type, input, m_, type, s_, type, left_,
                                       m_, type, right_, n_, type, &device_bytes, &host_bytes),
          "cusolverDnXgesvdp_bufferSize");
    Workspace work(call_);
    work.reserve(device_bytes, host_bytes);
    for (i64 b = 0; b < B_; ++b) {
      copy_on_device(call_, input, a_ + b * m_ * n_, m_ * n_);
      check(call_,
            cusolverDnXgesvdp(handle_, params, kVectors, kThin, m_, n_, type, input, m_, type, s_ + b * n_, type,
                              left_ + b * m_ * n_, m_, type, right_ + b * n_ * n_, n_, type, work.device(),
                              work.device_bytes(), work.host(), work.host_bytes(), info_ + b, &perturbation_[b]),
            "cusolverDnXgesvdp", {b, 1});
    }
  }

  // Near-singular matrices are perturbed by the polar method so that its factor becomes orthogonal, which shifts the
  // small singular values by as much as it reports. Beyond the rounding of a backward stable SVD, and where it did not
  // converge, Jacobi solves the matrix again.
  void repair() {
    constexpr double kUlps = 8;
    std::vector<i64> again;
    for (i64 b = 0; b < B_; ++b) {
      const double allowed = kUlps * std::numeric_limits<T>::epsilon() * static_cast<double>(outcome_.row(b)[0]);
      const bool perturbed = perturbation_[b] > allowed;
      if (outcome_.info[b] > 0 || (outcome_.is_finite(b) && perturbed)) again.push_back(b);
    }
    if (again.empty()) return;
    jacobi(again);
    outcome_.read(call_, info_, s_);
  }

  T* single_input() { return input_ ? input_ : input_ = allocate<T>(call_, m_ * n_); }

  const Call& call_;
  cusolverDnHandle_t handle_;
  i64 B_, m_, n_;
  const T* a_;
  T *s_, *left_, *right_;
  int* info_;
  T* input_ = nullptr;
  // What cuSOLVER writes to the host, perhaps only when the stream gets there.
  std::vector<double> perturbation_;
  Outcome<T> outcome_;
};

}  // namespace

template <typename T>
void svd(const Call& call, i64 B, i64 m, i64 n, const T* a, T* s, T* left, T* right) {
  Svd<T> problem(call, B, m, n, a, s, left, right);
  wait_on_failure(call, [&] { problem.run(); });
}

template void svd<float>(const Call&, i64, i64, i64, const float*, float*, float*, float*);
template void svd<double>(const Call&, i64, i64, i64, const double*, double*, double*, double*);

}  // namespace unirank::cuda::solver
