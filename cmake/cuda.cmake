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
if(NOT wanted MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "UNIRANK_CUDA must be AUTO, ON or OFF, got ${wanted}.")
endif()

find_program(UNIRANK_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin)

set(missing "")
if(UNIRANK_TORCH_CUDA STREQUAL "")
  set(missing "torch ${UNIRANK_TORCH_VERSION} is a CPU build; install a CUDA build of torch first")
elseif(NOT UNIRANK_NVCC)
  set(missing "nvcc was not found; install the CUDA toolkit or set CUDA_HOME")
else()
  execute_process(COMMAND "${UNIRANK_NVCC}" --version OUTPUT_VARIABLE nvcc_version COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCH "release ([0-9]+)\\.([0-9]+)" _ "${nvcc_version}")
  set(nvcc_version "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
  # cusolverDnXsyevBatched is of CUDA 12.6 update 2; the libraries loaded at run time are those of torch's major version.
  if(nvcc_version VERSION_LESS 12.8)
    set(missing "nvcc ${nvcc_version} is too old; install the CUDA toolkit 12.8 or newer")
  elseif(NOT UNIRANK_TORCH_CUDA MATCHES "^${CMAKE_MATCH_1}\\.")
    set(missing "nvcc is ${nvcc_version}, but torch was built with CUDA ${UNIRANK_TORCH_CUDA}; their major versions must agree")
  endif()
endif()

set(UNIRANK_BUILD_CUDA OFF)
if(wanted STREQUAL "ON" AND missing)
  message(FATAL_ERROR "UNIRANK_CUDA=ON cannot be honoured: ${missing}.")
elseif(wanted STREQUAL "AUTO" AND missing)
  message(STATUS "unirank: CUDA off, ${missing}")
elseif(NOT wanted STREQUAL "OFF")
  set(UNIRANK_BUILD_CUDA ON)
endif()
message(STATUS "unirank: torch ${UNIRANK_TORCH_VERSION}, CUDA kernels ${UNIRANK_BUILD_CUDA}")

if(NOT UNIRANK_BUILD_CUDA)
  return()
endif()

# Real code for every generation in use, and PTX of the newest for what comes after it.
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 89-real 90-real 100-real 120)
endif()
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
add_library(unirank_cuda MODULE ${UNIRANK_CUDA_SOURCES})
target_include_directories(unirank_cuda PRIVATE csrc)
target_include_directories(unirank_cuda SYSTEM PRIVATE ${UNIRANK_CUDA_INCLUDES})
# USE_CUDA opens the CUDA functions of the stable ABI's headers.
target_compile_definitions(unirank_cuda PRIVATE USE_CUDA)
target_compile_options(unirank_cuda PRIVATE
  "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Werror;-Wno-psabi;-ffile-prefix-map=${PROJECT_SOURCE_DIR}=.;-ffile-prefix-map=${UNIRANK_TORCH_ROOT}=torch>"
  "$<$<COMPILE_LANGUAGE:CUDA>:-lineinfo;--expt-relaxed-constexpr;-Werror;all-warnings;-Xcompiler=-Wall,-Wextra,-Wno-psabi,-ffile-prefix-map=${PROJECT_SOURCE_DIR}=.,-ffile-prefix-map=${UNIRANK_TORCH_ROOT}=torch>")
target_link_libraries(unirank_cuda PRIVATE
  unirank_torch "${UNIRANK_TORCH_ROOT}/lib/libtorch_cuda${CMAKE_SHARED_LIBRARY_SUFFIX}" ${UNIRANK_CUDA_LIBRARIES})
# --no-as-needed keeps libtorch_cuda, whose registrations must be loaded though no symbol of it is named here.
target_link_options(unirank_cuda PRIVATE -Wl,--no-as-needed)
unirank_module(unirank_cuda)
