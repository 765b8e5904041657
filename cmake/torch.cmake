# Target `unirank_torch`: headers, libraries and ABI version of the torch that Python would import.
# find_package(Torch) is avoided: with pip's CUDA wheels it asks for development files that they do not carry.

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/torch_info.py"
  OUTPUT_VARIABLE torch_info OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
string(JSON UNIRANK_TORCH_ROOT GET "${torch_info}" root)
string(JSON UNIRANK_TORCH_VERSION GET "${torch_info}" version)
string(JSON UNIRANK_TORCH_CUDA GET "${torch_info}" cuda)
string(JSON UNIRANK_TORCH_NVIDIA GET "${torch_info}" nvidia)

if(UNIRANK_TORCH_ROOT STREQUAL "")
  message(FATAL_ERROR
    "torch was not found by ${Python_EXECUTABLE}: install torch >= 2.10 there first, then build with "
    "`pip install --no-build-isolation .` so that the build sees it.")
endif()
# 2.10 is the first version with the stable ABI calls used here (parallel_for, const and mutable data pointers).
if(UNIRANK_TORCH_VERSION VERSION_LESS 2.10)
  message(FATAL_ERROR
    "torch ${UNIRANK_TORCH_VERSION} is too old: unirank needs torch >= 2.10, upgrade it with `pip install -U torch`.")
endif()

add_library(unirank_torch INTERFACE)
target_include_directories(unirank_torch SYSTEM INTERFACE
  "${UNIRANK_TORCH_ROOT}/include" "${UNIRANK_TORCH_ROOT}/include/torch/csrc/api/include")
target_compile_definitions(unirank_torch INTERFACE TORCH_TARGET_VERSION=0x020A000000000000)
target_link_libraries(unirank_torch INTERFACE
  "${UNIRANK_TORCH_ROOT}/lib/libtorch_cpu${CMAKE_SHARED_LIBRARY_SUFFIX}")
