# Compiler flags that our build and the stock peer share.

# GCC 12's _tile_loadconfig names 8 of the 64 bytes it reads as operand, so the compiler drops the other stores:
# llama.cpp's AMX kernels then crash on the first quantized matrix (seen with 12.2; llama.cpp issue 20824 looks
# alike). Which releases besides have that header was not tried: 11 to 13 are taken to.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64"
   AND CMAKE_CXX_COMPILER_VERSION VERSION_GREATER_EQUAL 11 AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 14)
    add_compile_options(-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
endif()
