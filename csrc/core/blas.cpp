#include "core/blas.h"

#include <dlfcn.h>

#include <cstdlib>

namespace unirank {
namespace {

// RTLD_DEFAULT also searches the dependencies of the library that asks, libtorch_cpu among them.
template <typename F>
void find(F& function, const char* symbol) {
  function = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, symbol));
}

template <typename T>
bool complete(const Blas<T>& b) {
  return b.syevd && b.gesdd;
}

using SetThreads = int (*)(int);  // returns the thread's previous setting; 0 means "follow the global one"

SetThreads mkl_set_threads() {
  static const SetThreads function = [] {
    SetThreads f = nullptr;
    find(f, "MKL_Set_Num_Threads_Local");
    return f;
  }();
  return function;
}

}  // namespace

template <>
const Blas<float>& blas<float>() {
  static const Blas<float> table = [] {
    Blas<float> b;
    find(b.syevd, "ssyevd_");
    find(b.gesdd, "sgesdd_");
    find(b.gemm, "sgemm_");
    return b;
  }();
  return table;
}

template <>
const Blas<double>& blas<double>() {
  static const Blas<double> table = [] {
    Blas<double> b;
    find(b.syevd, "dsyevd_");
    find(b.gesdd, "dgesdd_");
    find(b.gemm, "dgemm_");
    return b;
  }();
  return table;
}

bool has_lapack() { return !std::getenv("UNIRANK_NO_LAPACK") && complete(blas<float>()) && complete(blas<double>()); }

bool has_mkl_products() { return mkl_set_threads() && blas<float>().gemm && blas<double>().gemm; }

OneBlasThread::OneBlasThread() {
  if (const SetThreads set = mkl_set_threads()) previous_ = set(1);
}

OneBlasThread::~OneBlasThread() {
  if (const SetThreads set = mkl_set_threads()) set(previous_);
}

}  // namespace unirank
