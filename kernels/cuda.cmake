# The cuda device of spillway_kernels. Included by kernels/CMakeLists.txt; without SPILLWAY_CUDA no CUDA file is in any
# target. nvcc is called by a command of its own per file, not as a CMake language: so nothing outside this file needs to
# know, and ptxas's report of each file is kept (<build>/kernels/cuda/*.ptxas.txt; tests check it for spills).
#
# Linked: the static CUDA runtime, which finds the driver when it is first used. cuBLASLt is looked up at run time.

if(NOT SPILLWAY_CUDA)
  target_sources(spillway_kernels PRIVATE ${CMAKE_CURRENT_LIST_DIR}/cuda/absent.cc)
  return()
endif()

set(SPILLWAY_CUDA_ARCHITECTURES "80-real;90a-real;120-real;80-virtual" CACHE STRING
    "As CMAKE_CUDA_ARCHITECTURES: machine code (real) and PTX (virtual) to build")
find_program(SPILLWAY_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin PATHS /usr/local/cuda/bin REQUIRED)
get_filename_component(SPILLWAY_CUDA_ROOT ${SPILLWAY_NVCC} REALPATH)
get_filename_component(SPILLWAY_CUDA_ROOT ${SPILLWAY_CUDA_ROOT}/../.. ABSOLUTE)
find_path(SPILLWAY_CUDA_INCLUDE cuda_runtime.h HINTS ${SPILLWAY_CUDA_ROOT}/include
          ${SPILLWAY_CUDA_ROOT}/targets/x86_64-linux/include REQUIRED)
find_library(SPILLWAY_CUDART cudart_static HINTS ${SPILLWAY_CUDA_ROOT}/lib64
             ${SPILLWAY_CUDA_ROOT}/targets/x86_64-linux/lib REQUIRED)

set(nvcc_flags -std=c++20 -O3 -I${CMAKE_CURRENT_LIST_DIR}/.. --expt-relaxed-constexpr
    -fmad=false  # every fused multiply-add is written as one
    -Xcompiler=-Wall,-Wextra,-Wshadow,-Werror --Werror all-warnings -Xptxas=-v -ccbin ${CMAKE_CXX_COMPILER})
set(gencode)
foreach(architecture IN LISTS SPILLWAY_CUDA_ARCHITECTURES)
  string(REGEX MATCH "^([0-9]+[af]?)-(real|virtual)$" matched ${architecture})
  if(NOT matched)
    message(FATAL_ERROR "SPILLWAY_CUDA_ARCHITECTURES: ${architecture} is neither <number>-real nor <number>-virtual")
  endif()
  if(CMAKE_MATCH_2 STREQUAL "real")
    list(APPEND gencode -gencode=arch=compute_${CMAKE_MATCH_1},code=sm_${CMAKE_MATCH_1})
  else()
    list(APPEND gencode -gencode=arch=compute_${CMAKE_MATCH_1},code=compute_${CMAKE_MATCH_1})
  endif()
endforeach()

set(cuda_objects)
function(spillway_cuda_object name)  # and nvcc's -gencode options
  set(source ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/cuda/${name}.cu)
  set(object ${CMAKE_CURRENT_BINARY_DIR}/cuda/${name}.o)
  add_custom_command(
    OUTPUT ${object}
    BYPRODUCTS ${CMAKE_CURRENT_BINARY_DIR}/cuda/${name}.ptxas.txt
    COMMAND ${CMAKE_COMMAND} -DREPORT=${CMAKE_CURRENT_BINARY_DIR}/cuda/${name}.ptxas.txt
            -P ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/cuda/compile.cmake --
            ${SPILLWAY_NVCC} ${nvcc_flags} ${ARGN} -MD -MF ${object}.d -MT ${object} -c ${source} -o ${object}
    DEPENDS ${source} ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/cuda/compile.cmake
    DEPFILE ${object}.d
    COMMENT "nvcc ${name}.cu"
    VERBATIM)
  set(cuda_objects ${cuda_objects} ${object} PARENT_SCOPE)
endfunction()
foreach(name IN ITEMS attention_decode attention_merge attention_plain attention_tensor gather gemm_plain row_kernels sample)
  spillway_cuda_object(${name} ${gencode})
endforeach()
# wgmma is in sm_90a's machine code alone.
if("90a-real" IN_LIST SPILLWAY_CUDA_ARCHITECTURES)
  spillway_cuda_object(attention_hopper -gencode=arch=compute_90a,code=sm_90a)
else()
  target_sources(spillway_kernels PRIVATE ${CMAKE_CURRENT_LIST_DIR}/cuda/attention_hopper_absent.cc)
  target_include_directories(spillway_kernels SYSTEM PRIVATE ${SPILLWAY_CUDA_INCLUDE})
endif()
set_source_files_properties(${cuda_objects} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)

set(cuda_dir ${CMAKE_CURRENT_LIST_DIR}/cuda)
target_sources(spillway_kernels PRIVATE
  ${cuda_objects} ${cuda_dir}/blas.cc ${cuda_dir}/device.cc ${cuda_dir}/errors.cc ${cuda_dir}/kernels.cc
  ${cuda_dir}/memory.cc ${cuda_dir}/stream.cc ${cuda_dir}/tensor_map.cc)
target_include_directories(spillway_kernels SYSTEM PRIVATE ${SPILLWAY_CUDA_INCLUDE})
target_link_libraries(spillway_kernels PRIVATE ${SPILLWAY_CUDART} Threads::Threads ${CMAKE_DL_LIBS} rt)
