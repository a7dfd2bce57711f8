# The packages of bench/gpu/pack.sh as the targets that our CMake files name. SPILLWAY_CARRIED is the unpacked folder.
include_guard(GLOBAL)

function(carried_target name)
  cmake_parse_arguments(ARG "" "" "LINK" ${ARGN})
  add_library(${name} INTERFACE IMPORTED GLOBAL)
  target_include_directories(${name} SYSTEM INTERFACE ${SPILLWAY_CARRIED}/include)
  target_link_libraries(${name} INTERFACE ${ARG_LINK} Threads::Threads)
endfunction()

find_package(Threads REQUIRED)
file(GLOB absl_archives ${SPILLWAY_CARRIED}/lib/libabsl_*.a)
# The archives refer to each other in circles; the linker takes from them what is used.
carried_target(carried_absl LINK -Wl,--start-group ${absl_archives} -Wl,--end-group)
foreach(part IN ITEMS base bits btree cleanup core_headers flat_hash_map flat_hash_set function_ref hash node_hash_map random_random
                      span status statusor str_format strings synchronization time)
  carried_target(absl::${part} LINK carried_absl)
endforeach()
carried_target(GTest::gtest LINK ${SPILLWAY_CARRIED}/lib/libgtest.a)
carried_target(GTest::gmock LINK ${SPILLWAY_CARRIED}/lib/libgmock.a)
carried_target(GTest::gtest_main LINK ${SPILLWAY_CARRIED}/lib/libgtest_main.a GTest::gtest)
carried_target(ICU::uc LINK ${SPILLWAY_CARRIED}/lib/libicuuc.a ${SPILLWAY_CARRIED}/lib/libicudata.a ${CMAKE_DL_LIBS})
carried_target(OpenSSL::Crypto LINK ${SPILLWAY_CARRIED}/lib/libcrypto.a ${CMAKE_DL_LIBS})
carried_target(nlohmann_json::nlohmann_json)
carried_target(hwy LINK ${SPILLWAY_CARRIED}/lib/libhwy.so.1)
set(CMAKE_BUILD_RPATH ${SPILLWAY_CARRIED}/lib CACHE PATH "")
