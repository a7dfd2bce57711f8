# Tests of the cuda device. cuda.*: on a GPU, each skipped by name where there is none. cuda_emulated.*: the same sources with the
# kernels compiled for the CPU (cuda_emulation.h), which needs CUDA's headers only; not under sanitizers, which do not follow
# the emulation's fibers.

get_filename_component(root ${CMAKE_CURRENT_LIST_DIR}/../.. ABSOLUTE)

function(spillway_cuda_test name prefix)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEFINITIONS;LIBS;FILTER" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_include_directories(${name} SYSTEM PRIVATE ${SPILLWAY_CUDA_INCLUDE})
  target_compile_definitions(${name} PRIVATE SPILLWAY_SOURCE_DIR="${root}" ${ARG_DEFINITIONS})
  target_link_libraries(${name} PRIVATE ${ARG_LIBS} spillway_kernels GTest::gtest GTest::gmock GTest::gtest_main ${CMAKE_DL_LIBS})
  if(NOT ARG_FILTER)
    set(ARG_FILTER *)
  endif()
  gtest_discover_tests(${name} TEST_PREFIX ${prefix}. TEST_FILTER ${ARG_FILTER} DISCOVERY_TIMEOUT 60 PROPERTIES TIMEOUT 600)
endfunction()

# Bits that are the cpu device's are no part of the conformance suite. What looks at blocks from the host, or plants faults in the cpu device, stays there.
set(of_engine -*KvBytes*:PlantedFault*)
if(SPILLWAY_CUDA)
  spillway_cuda_test(cuda_conformance_test cuda SOURCES ${CMAKE_CURRENT_LIST_DIR}/cuda_conformance_test.cc FILTER -*AllMachines*)
  spillway_cuda_test(cuda_device_test cuda SOURCES ${CMAKE_CURRENT_LIST_DIR}/cuda_device_test.cc)
  spillway_cuda_test(cuda_prefill_test cuda SOURCES ${CMAKE_CURRENT_LIST_DIR}/cuda_prefill_test.cc)
  foreach(name IN ITEMS golden identity tiers beyond float16 parity)
    spillway_cuda_test(cuda_${name}_test cuda SOURCES ${CMAKE_CURRENT_LIST_DIR}/cuda_${name}_test.cc
                       LIBS spillway_engine nlohmann_json::nlohmann_json FILTER ${of_engine})
  endforeach()
  get_target_property(kernels_build spillway_kernels BINARY_DIR)
  add_test(NAME cuda.no_spills COMMAND ${CMAKE_COMMAND} -DREPORTS=${kernels_build}/cuda
                                       -P ${CMAKE_CURRENT_LIST_DIR}/cuda_spills.cmake)
endif()

find_path(SPILLWAY_CUDA_INCLUDE cuda_runtime.h HINTS $ENV{CUDA_HOME}/include PATHS /usr/local/cuda/include)
if(NOT SPILLWAY_CUDA_INCLUDE OR SPILLWAY_SANITIZE OR NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  add_test(NAME cuda_emulated COMMAND ${CMAKE_COMMAND} -E echo "SKIPPED: needs CUDA's headers, x86-64 and no sanitizer")
  set_tests_properties(cuda_emulated PROPERTIES SKIP_REGULAR_EXPRESSION "^SKIPPED")
  return()
endif()

# Its own build of kernels/cuda: these definitions are met before the archive's.
set(cuda_dir ${root}/kernels/cuda)
file(GLOB kernel_sources CONFIGURE_DEPENDS ${cuda_dir}/*.cu)
set_source_files_properties(${kernel_sources} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS
  "-xc++;-include;${CMAKE_CURRENT_LIST_DIR}/cuda_emulation.h;-Wno-unknown-pragmas;-Wno-unused-function;-Wno-pedantic;-Wno-psabi")
add_library(cuda_emulated OBJECT
  ${kernel_sources} ${cuda_dir}/blas.cc ${cuda_dir}/device.cc ${cuda_dir}/errors.cc ${cuda_dir}/kernels.cc
  ${cuda_dir}/memory.cc ${cuda_dir}/stream.cc ${cuda_dir}/tensor_map.cc
  ${CMAKE_CURRENT_LIST_DIR}/cuda_emulation.cc ${CMAKE_CURRENT_LIST_DIR}/cuda_emulated_runtime.cc
  ${CMAKE_CURRENT_LIST_DIR}/cuda_emulated_wgmma.cc)
target_include_directories(cuda_emulated SYSTEM PRIVATE ${SPILLWAY_CUDA_INCLUDE})
target_link_libraries(cuda_emulated PRIVATE spillway_flags absl::status absl::statusor absl::strings)
# Stands in for cuBLASLt; it queues by the runtime in the program that opens it, so these programs export that.
add_library(cuda_emulated_blas MODULE ${CMAKE_CURRENT_LIST_DIR}/cuda_emulated_blas.cc)
target_include_directories(cuda_emulated_blas SYSTEM PRIVATE ${SPILLWAY_CUDA_INCLUDE})
target_link_libraries(cuda_emulated_blas PRIVATE spillway_flags)
function(spillway_emulated_test name)
  spillway_cuda_test(cuda_emulated_${name}_test cuda_emulated ${ARGN}
                     SOURCES ${CMAKE_CURRENT_LIST_DIR}/cuda_${name}_test.cc $<TARGET_OBJECTS:cuda_emulated>
                     DEFINITIONS SPILLWAY_CUDA_EMULATED SPILLWAY_EMULATED_CUBLASLT="$<TARGET_FILE:cuda_emulated_blas>")
  set_target_properties(cuda_emulated_${name}_test PROPERTIES ENABLE_EXPORTS ON)
  add_dependencies(cuda_emulated_${name}_test cuda_emulated_blas)
endfunction()
foreach(name IN ITEMS conformance device prefill)
  spillway_emulated_test(${name} FILTER -*Frequencies*:*ChunksTokens*float16:*AllMachines*)  # what takes longest
endforeach()
function(spillway_emulated_engine_test name filter)
  spillway_emulated_test(${name} LIBS spillway_engine nlohmann_json::nlohmann_json FILTER ${filter})
endfunction()
# A few of minutes' worth.
spillway_emulated_engine_test(float16 *)
spillway_emulated_engine_test(parity *)
spillway_emulated_engine_test(golden *hf_auto)
spillway_emulated_engine_test(tiers *pool12_chunk16_host400)
spillway_emulated_engine_test(beyond BeyondOne*)
