// The BLAS and LAPACK that torch itself runs, found among the loaded libraries: no second one is linked.
#pragma once

namespace unirank {

// There is no gesvd here: torch's x86 wheel does not export it.
// LP64 Fortran interface: 32-bit integers. Each character argument has a hidden length at the end (as size_t).
template <typename T>
struct Blas {
  using Syevd = void (*)(const char* jobz, const char* uplo, const int* n, T* a, const int* lda, T* w, T* work,
                         const int* lwork, int* iwork, const int* liwork, int* info, unsigned long, unsigned long);
  using Gesdd = void (*)(const char* jobz, const int* m, const int* n, T* a, const int* lda, T* s, T* u, const int* ldu,
                         T* vt, const int* ldvt, T* work, const int* lwork, int* iwork, int* info, unsigned long);
  using Gemm = void (*)(const char* transa, const char* transb, const int* m, const int* n, const int* k,
                        const T* alpha, const T* a, const int* lda, const T* b, const int* ldb, const T* beta, T* c,
                        const int* ldc, unsigned long, unsigned long);
  Syevd syevd = nullptr;
  Gesdd gesdd = nullptr;
  Gemm gemm = nullptr;
};

template <typename T>
const Blas<T>& blas();

// True where every LAPACK routine above was found in both precisions. False with the environment variable
// UNIRANK_NO_LAPACK set, so that the road without them can be tested anywhere.
bool has_lapack();

// True where the BLAS is MKL, its products were found in both precisions, and OneBlasThread has its effect.
bool has_mkl_products();

// While one lives, MKL runs the calling thread's work on that thread alone, whatever torch.set_num_threads says.
// MKL splits sums by its thread count, so this is what makes results independent of it.
// Where the BLAS is not MKL it does nothing, and bits may depend on the thread count.
class OneBlasThread {
 public:
  OneBlasThread();
  ~OneBlasThread();
  OneBlasThread(const OneBlasThread&) = delete;
  OneBlasThread& operator=(const OneBlasThread&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace unirank
