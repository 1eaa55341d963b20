# cmake -DCOMPILER=... -DARCH=gfx942 -DSOURCE=x.hip -DOBJECT=x.hsaco [-DLOG=file] -P compile.cmake
# Compiles one kernel family for one architecture, and says how long it took and what came of it.
get_filename_component(name ${COMPILER} NAME)
get_filename_component(folder ${OBJECT} DIRECTORY)
file(MAKE_DIRECTORY ${folder})
set(device_only --offload-device-only)
if(name MATCHES "python-zig")
  # A script of the source tree: one that each compilation writes is busy when another runs it.
  set(ENV{ROCMFORGE_ZIG} ${COMPILER})
  set(ENV{PATH} "${CMAKE_CURRENT_LIST_DIR}/zig:$ENV{PATH}")
  # The script is Python, from which pip's isolated builds hide all that is installed.
  if("$ENV{PYTHONPATH}" MATCHES "/pip-build-env-")
    string(REGEX REPLACE "[^:]*/pip-build-env-[^:]*:?" "" path "$ENV{PYTHONPATH}")
    set(ENV{PYTHONPATH} "${path}")
    unset(ENV{PYTHONNOUSERSITE})
  endif()
  set(COMPILER ${COMPILER} clang)
elseif(name MATCHES "hipcc")
  set(ENV{HIP_PLATFORM} amd)
  set(device_only --genco)
endif()
# Generic objects need version 6, of which clang 19 warns; older HIP runtimes take 5 only.
set(version "")
set(werror "")
if(ARCH MATCHES "generic")
  set(version -mcode-object-version=6)
elseif(WERROR)
  set(werror -Werror)
endif()
# SLP vectorisation makes pairs for packed arithmetic that double what a scalar factor takes in
# registers: gfx942 needed 292 of them for the 128-element kernels, without it 177.
string(TIMESTAMP begin %s)
execute_process(COMMAND ${COMPILER} -x hip ${device_only} --no-gpu-bundle-output --offload-arch=${ARCH}
  ${version} -std=c++17 -O3 -fno-slp-vectorize -ffreestanding -nogpulib -nogpuinc
  -Wall -Wextra -Wshadow ${werror} -I${CMAKE_CURRENT_LIST_DIR}/../include ${SOURCE} -o ${OBJECT}
  RESULT_VARIABLE status)
string(TIMESTAMP end %s)
if(NOT status EQUAL 0)
  file(REMOVE ${OBJECT})
  message(FATAL_ERROR "${COMPILER} failed for ${ARCH}: ${status}")
endif()
if(LOG)
  math(EXPR seconds "${end} - ${begin}")
  file(SIZE ${OBJECT} bytes)
  get_filename_component(object ${OBJECT} NAME)
  file(APPEND ${LOG} "${object} ${seconds} s ${bytes} bytes\n")
  message("${object}: ${seconds} s, ${bytes} bytes")
endif()
