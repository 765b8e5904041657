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
        B_(B),
        m_(m),
        n_(n),
        a_(a),
        s_(s),
        left_(left),
        right_(right),
        perturbation_(static_cast<std::size_t>(B)),
        outcome_(B, n) {}

  void run() {
    handle_ = thread_handle(call_);
    require_finite(call_, a_, {0, B_}, m_, n_, false);
    info_ = allocate_info(call_, B_);
    if (m_ <= kJacobiBatchedSide && n_ <= kJacobiBatchedSide) {
      jacobi_batched();
    } else {
      polar();
    }
    outcome_.read(call_, info_, s_);
    repair();
    check_outcome(call_, outcome_, a_, m_, n_, false);
  }

 private:
  static constexpr i64 kSize = sizeof(T);

  int m() const { return static_cast<int>(m_); }
  int n() const { return static_cast<int>(n_); }

  // One call for a batch of small matrices, which is a block of threads each: matrix by matrix, as the other methods
  // work, launches would take longer than the mathematics. At these sides Jacobi needs few sweeps and is at least as
  // exact. It knows no thin form: left vectors come as m x m and lose their last columns.
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
      const cusolverStatus_t status = Api<T>::gesvdj_batched(handle_, kVectors, m(), n(), x, m(), s, u, m(), v, n(),
                                                             work, length, info_ + first, jacobi_info, batch);
      check_solver(call_, status, "cusolverDn*gesvdjBatched", {first, count}, info_, a_, m_, n_, false);
    });
    if (m_ != n_) {
      const std::size_t row = sizeof(T) * static_cast<std::size_t>(m_);
      check(call_,
            cudaMemcpy2DAsync(left_, row * n_, full, row * m_, row * n_, static_cast<std::size_t>(B_),
                              cudaMemcpyDeviceToDevice, call_.stream),
            "cudaMemcpy2DAsync");
    }
  }

  // QR iteration, for the few matrices that the method before it could not do exactly: slower than the polar method and
  // backward stable whatever the matrix. It leaves right vectors as rows.
  void qr_iteration(const std::vector<i64>& matrices) {
    constexpr auto kRoutine = "cusolverDnXgesvd";
    constexpr signed char kThinVectors = 'S';
    constexpr auto type = Api<T>::type;
    const Params params(call_);
    T* input = single_input();
    T* rows = allocate<T>(call_, n_ * n_);
    std::size_t device_bytes = 0, host_bytes = 0;
    check(call_,
          cusolverDnXgesvd_bufferSize(handle_, params, kThinVectors, kThinVectors, m_, n_, type, input, m_, type, s_,
                                      type, left_, m_, type, rows, n_, type, &device_bytes, &host_bytes),
          "cusolverDnXgesvd_bufferSize");
    Workspace work(call_);
    work.reserve(device_bytes, host_bytes);
    for (const i64 b : matrices) {
      copy_on_device(call_, input, a_ + b * m_ * n_, m_ * n_);
      const cusolverStatus_t status =
          cusolverDnXgesvd(handle_, params, kThinVectors, kThinVectors, m_, n_, type, input, m_, type, s_ + b * n_,
                           type, left_ + b * m_ * n_, m_, type, rows, n_, type, work.device(), work.device_bytes(),
                           work.host(), work.host_bytes(), info_ + b);
      check_solver(call_, status, kRoutine, {b, 1}, info_, a_, m_, n_, false);
      queue_transpose(call_, rows, n_, right_ + b * n_ * n_);
    }
  }

  void polar() {
    const Params params(call_);
    constexpr auto type = Api<T>::type;
    T* input = single_input();
    std::size_t device_bytes = 0, host_bytes = 0;
    check(call_,
          cusolverDnXgesvdp_bufferSize(handle_, params, kVectors, kThin, m_, n_, type, input, m_, type, s_, type, left_,
                                       m_, type, right_, n_, type, &device_bytes, &host_bytes),
          "cusolverDnXgesvdp_bufferSize");
    Workspace work(call_);
    work.reserve(device_bytes, host_bytes);
    for (i64 b = 0; b < B_; ++b) {
      copy_on_device(call_, input, a_ + b * m_ * n_, m_ * n_);
      const cusolverStatus_t status =
          cusolverDnXgesvdp(handle_, params, kVectors, kThin, m_, n_, type, input, m_, type, s_ + b * n_, type,
                            left_ + b * m_ * n_, m_, type, right_ + b * n_ * n_, n_, type, work.device(),
                            work.device_bytes(), work.host(), work.host_bytes(), info_ + b, &perturbation_[b]);
      check_solver(call_, status, "cusolverDnXgesvdp", {b, 1}, info_, a_, m_, n_, false);
    }
  }

  // Near-singular matrices are perturbed by the polar method so that its factor becomes orthogonal, which shifts the
  // small singular values by as much as it reports. Beyond the rounding of a backward stable SVD, and where either
  // method did not converge, the matrix is solved again.
  void repair() {
    constexpr double kUlps = 8;
    std::vector<i64> again;
    for (i64 b = 0; b < B_; ++b) {
      const double allowed = kUlps * std::numeric_limits<T>::epsilon() * static_cast<double>(outcome_.row(b)[0]);
      const bool perturbed = perturbation_[b] > allowed;
      if (outcome_.info[b] > 0 || (outcome_.is_finite(b) && perturbed)) again.push_back(b);
    }
    if (again.empty()) return;
    qr_iteration(again);
    outcome_.read(call_, info_, s_);
  }

  T* single_input() { return input_ ? input_ : input_ = allocate<T>(call_, m_ * n_); }

  const Call& call_;
  cusolverDnHandle_t handle_ = nullptr;
  i64 B_, m_, n_;
  const T* a_;
  T *s_, *left_, *right_;
  int* info_ = nullptr;
  T* input_ = nullptr;
  // What cuSOLVER writes to the host, perhaps only when the stream gets there.
  std::vector<double> perturbation_;
  Outcome<T> outcome_;
};

}  // namespace

template <typename T>
void svd(const Call& call, i64 B, i64 m, i64 n, const T* a, T* s, T* left, T* right) {
  Svd<T> problem(call, B, m, n, a, s, left, right);
  settle_on_failure(call, [&] { problem.run(); });
}

template void svd<float>(const Call&, i64, i64, i64, const float*, float*, float*, float*);
template void svd<double>(const Call&, i64, i64, i64, const double*, double*, double*, double*);

}  // namespace unirank::cuda::solver
