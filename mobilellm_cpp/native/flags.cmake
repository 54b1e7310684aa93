# Compiler flags that our build and the stock peer share.

# GCC before 14 drops stores that only _tile_loadconfig reads (GCC bug 114098): llama.cpp's AMX kernels then
# crash on the first quantized matrix (llama.cpp issue 20824).
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64"
   AND CMAKE_CXX_COMPILER_VERSION VERSION_GREATER_EQUAL 11 AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 14)
    add_compile_options(-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
endif()
