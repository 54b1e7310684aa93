# CMake toolchain for wheels: this machine's GCC for $ENV{WHEEL_PROCESSOR}, over the C and C++ libraries of the older Debian
# that packaging/debian-root has unpacked into $ENV{WHEEL_ROOT}. Its folders come first, or the compiler's own newer
# libstdc++ is linked.
set(triple $ENV{WHEEL_PROCESSOR}-linux-gnu)
set(root $ENV{WHEEL_ROOT})
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR $ENV{WHEEL_PROCESSOR})
set(CMAKE_C_COMPILER ${triple}-gcc)
set(CMAKE_CXX_COMPILER ${triple}-g++)
set(CMAKE_SYSROOT ${root})
set(CMAKE_CXX_FLAGS_INIT
    "-nostdinc++ -isystem ${root}/usr/include/c++/10 -isystem ${root}/usr/include/${triple}/c++/10")
set(libraries "-L${root}/usr/lib/gcc/${triple}/10 -L${root}/usr/lib/${triple} -L${root}/lib/${triple}")
foreach(kind SHARED MODULE EXE)
    set(CMAKE_${kind}_LINKER_FLAGS_INIT "${libraries} -B${root}/usr/lib/${triple}")
endforeach()
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
