# What is missing for the CUDA kernels, and whether they are built: functions of versions alone, for tests in `cmake -P`.

# Puts the first thing that is missing into `result`, as a sentence without its end; empty where nothing is.
# cmake: CMAKE_VERSION; torch, torch_cuda: versions, torch_cuda empty for a CPU build; nvcc: its version, or empty.
function(unirank_cuda_missing result cmake torch torch_cuda nvcc)
  set(missing "")
  string(REGEX MATCH "^[0-9]+" major "${nvcc}")
  if(torch_cuda STREQUAL "")
    set(missing "torch ${torch} is a CPU build; install a CUDA build of torch first")
  elseif(nvcc STREQUAL "")
    set(missing "nvcc was not found; install the CUDA toolkit or set CUDA_HOME")
  elseif(nvcc VERSION_LESS 12.8)
    # cusolverDnXsyevBatched is of CUDA 12.6 update 2.
    set(missing "nvcc ${nvcc} is too old; install the CUDA toolkit 12.8 or newer")
  elseif(NOT torch_cuda MATCHES "^${major}\\.")
    # The libraries loaded at run time are those of torch's major version.
    set(missing "nvcc is ${nvcc}, but torch was built with CUDA ${torch_cuda}; their major versions must agree")
  elseif(cmake VERSION_LESS 3.25.2)
    # Older ones have no C++20 for nvcc 12 and newer, and stop at the first target with "dialect CUDA20".
    set(missing "CMake ${cmake} is too old for CUDA in C++20; install CMake 3.25.2 or newer, by `pip install -U cmake`")
  endif()
  set(${result} "${missing}" PARENT_SCOPE)
endfunction()

# ON or OFF into `result`, from what is wanted (AUTO, ON, OFF) and missing. ON with something missing stops here.
function(unirank_cuda_mode result wanted missing)
  if(NOT wanted MATCHES "^(AUTO|ON|OFF)$")
    message(FATAL_ERROR "UNIRANK_CUDA must be AUTO, ON or OFF, got ${wanted}.")
  endif()
  set(mode ON)
  if(wanted STREQUAL "OFF")
    set(mode OFF)
  elseif(missing AND wanted STREQUAL "ON")
    message(FATAL_ERROR "UNIRANK_CUDA=ON cannot be honoured: ${missing}.")
  elseif(missing)
    message(STATUS "unirank: CUDA off, ${missing}")
    set(mode OFF)
  endif()
  set(${result} ${mode} PARENT_SCOPE)
endfunction()

# Real code for every generation in use. PTX of 80 is for devices from 8.0 on without code of their own, such as 11.0
# (Thor); PTX of 120 for what comes after it. 75 has no PTX: code of one major version runs on all its later minors.
set(UNIRANK_CUDA_ARCHITECTURES 75-real 80 86-real 89-real 90-real 100-real 120)

# Into `result`: what the user set, as CMake's variable or the environment's CMAKE_CUDA_ARCHITECTURES or CUDAARCHS, in
# this order, else the list above. To be called before CUDA is enabled, which fills the variable in.
function(unirank_cuda_architectures result)
  set(found ${UNIRANK_CUDA_ARCHITECTURES})
  foreach(name CUDAARCHS CMAKE_CUDA_ARCHITECTURES)
    if(NOT "$ENV{${name}}" STREQUAL "")
      set(found $ENV{${name}})
    endif()
  endforeach()
  if(NOT "${CMAKE_CUDA_ARCHITECTURES}" STREQUAL "")
    set(found ${CMAKE_CUDA_ARCHITECTURES})
  endif()
  set(${result} ${found} PARENT_SCOPE)
endfunction()
