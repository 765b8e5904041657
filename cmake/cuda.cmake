# Decides UNIRANK_BUILD_CUDA from UNIRANK_CUDA = AUTO | ON | OFF (cache variable, else environment variable, else AUTO),
# and builds the module `unirank_cuda` where it is on.

set(UNIRANK_CUDA "" CACHE STRING "AUTO, ON or OFF; empty: the environment variable UNIRANK_CUDA, else AUTO")
set(wanted "${UNIRANK_CUDA}")
if(wanted STREQUAL "" AND DEFINED ENV{UNIRANK_CUDA})
  set(wanted "$ENV{UNIRANK_CUDA}")
endif()
if(wanted STREQUAL "")
  set(wanted AUTO)
endif()
include(cmake/cuda_mode.cmake)
find_program(UNIRANK_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin)
set(nvcc_version "")
if(UNIRANK_NVCC)
  execute_process(COMMAND "${UNIRANK_NVCC}" --version OUTPUT_VARIABLE nvcc_version COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" _ "${nvcc_version}")
  set(nvcc_version "${CMAKE_MATCH_1}")
endif()
unirank_cuda_missing(missing "${CMAKE_VERSION}" "${UNIRANK_TORCH_VERSION}" "${UNIRANK_TORCH_CUDA}" "${nvcc_version}")
unirank_cuda_mode(UNIRANK_BUILD_CUDA "${wanted}" "${missing}")
message(STATUS "unirank: torch ${UNIRANK_TORCH_VERSION}, CUDA kernels ${UNIRANK_BUILD_CUDA}")

if(NOT UNIRANK_BUILD_CUDA)
  return()
endif()

unirank_cuda_architectures(CMAKE_CUDA_ARCHITECTURES)
set(CMAKE_CUDA_COMPILER "${UNIRANK_NVCC}")
# One runtime in the process, torch's: a static one would keep a context and streams of its own.
set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)

# cuBLAS, cuSOLVER and the runtime: the pip wheels that torch itself loads, else a toolkit. The wheels have no
# development links, only libX.so.N, so they are found by pattern.
find_package(CUDAToolkit REQUIRED)
set(UNIRANK_CUDA_INCLUDES ${CUDAToolkit_INCLUDE_DIRS})
set(UNIRANK_CUDA_LIBRARIES "")
foreach(library cublas cusolver cudart)
  file(GLOB found "${UNIRANK_TORCH_NVIDIA}/lib/lib${library}.so.*")
  if(UNIRANK_TORCH_NVIDIA AND found)
    list(GET found 0 found)
    list(APPEND UNIRANK_CUDA_LIBRARIES "${found}")
  elseif(TARGET CUDA::${library})
    list(APPEND UNIRANK_CUDA_LIBRARIES CUDA::${library})
  else()
    message(FATAL_ERROR "lib${library} was found neither beside torch (nvidia/cu13) nor in a CUDA toolkit.")
  endif()
endforeach()
if(EXISTS "${UNIRANK_TORCH_NVIDIA}/include/cusolverDn.h")
  # Before the toolkit's, so that headers and libraries are of one version.
  list(PREPEND UNIRANK_CUDA_INCLUDES "${UNIRANK_TORCH_NVIDIA}/include")
endif()

file(GLOB UNIRANK_CUDA_SOURCES CONFIGURE_DEPENDS
  "${PROJECT_SOURCE_DIR}/csrc/cuda/*.cu" "${PROJECT_SOURCE_DIR}/csrc/cuda/*.cpp")
# unirank.libraries reads it: a device that the library has no code for is served by the torch compositions.
file(CONFIGURE OUTPUT "${PROJECT_BINARY_DIR}/architectures.cpp" CONTENT [[
extern "C" {
extern __attribute__((visibility("default"))) const char unirank_cuda_architectures[];
const char unirank_cuda_architectures[] = "@CMAKE_CUDA_ARCHITECTURES@";
}
]] @ONLY)
add_library(unirank_cuda MODULE ${UNIRANK_CUDA_SOURCES} "${PROJECT_BINARY_DIR}/architectures.cpp")
target_include_directories(unirank_cuda PRIVATE csrc)
target_include_directories(unirank_cuda SYSTEM PRIVATE ${UNIRANK_CUDA_INCLUDES})
# USE_CUDA opens the CUDA functions of the stable ABI's headers.
target_compile_definitions(unirank_cuda PRIVATE USE_CUDA)
# Lines of the source, for profilers and compute-sanitizer, name the builder's folders, which no wheel must do.
set(UNIRANK_LINEINFO "$ENV{UNIRANK_LINEINFO}" CACHE BOOL "Lines of the source in the machine code; tools/gpu_check.sh sets it")
target_compile_options(unirank_cuda PRIVATE
  "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wno-psabi;-ffile-prefix-map=${PROJECT_SOURCE_DIR}=.;-ffile-prefix-map=${UNIRANK_TORCH_ROOT}=torch>"
  "$<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${UNIRANK_LINEINFO}>>:-lineinfo>"
  "$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;-Xcompiler=-Wall,-Wextra,-Wno-psabi,-ffile-prefix-map=${PROJECT_SOURCE_DIR}=.,-ffile-prefix-map=${UNIRANK_TORCH_ROOT}=torch>")
target_link_libraries(unirank_cuda PRIVATE
  unirank_torch "${UNIRANK_TORCH_ROOT}/lib/libtorch_cuda${CMAKE_SHARED_LIBRARY_SUFFIX}" ${UNIRANK_CUDA_LIBRARIES}
  ${CMAKE_DL_LIBS})
# --no-as-needed keeps libtorch_cuda, whose registrations must be loaded though no symbol of it is named here.
target_link_options(unirank_cuda PRIVATE -Wl,--no-as-needed)
unirank_module(unirank_cuda)
