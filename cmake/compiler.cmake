# Enables C++20 or stops with one sentence; CMake's own message for a missing compiler does not say what to do.

include(CheckLanguage)
check_language(CXX)
if(NOT CMAKE_CXX_COMPILER)
  message(FATAL_ERROR "No C++ compiler was found: install one that knows C++20 (GCC >= 11 or Clang >= 14) or point CXX at it.")
endif()
enable_language(CXX)

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)

if(NOT "cxx_std_20" IN_LIST CMAKE_CXX_COMPILE_FEATURES)
  set(UNIRANK_HAS_CXX20 OFF)
else()
  include(CheckCXXSourceCompiles)
  check_cxx_source_compiles(
    "#include <bit>\n#include <concepts>\n#include <span>\nint main() { return std::span<int>{}.size() + std::bit_cast<int>(0u); }"
    UNIRANK_HAS_CXX20)
endif()
if(NOT UNIRANK_HAS_CXX20)
  message(FATAL_ERROR
    "${CMAKE_CXX_COMPILER} (${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}) does not compile C++20: "
    "install GCC >= 11 or Clang >= 14 or point CXX at one.")
endif()
