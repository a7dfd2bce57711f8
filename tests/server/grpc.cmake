# The gRPC front end and the program: options, watchdog, load generator.
# Not under ThreadSanitizer: the gRPC library is not built with it, so everything that one gRPC thread hands to another is
# reported. What the front end stands on is covered there by the tests of Service.
if(NOT SPILLWAY_SANITIZE STREQUAL "thread")
  spillway_test(grpc_test SOURCES grpc_test.cc LIBS spillway_grpc spillway_proto)
endif()
spillway_test(program_test SOURCES bench_test.cc demo_model_test.cc host_test.cc modelled_test.cc options_test.cc watchdog_test.cc
              LIBS spillway_program fmt::fmt nlohmann_json::nlohmann_json)
include(${CMAKE_SOURCE_DIR}/tests/e2e/e2e.cmake)
include(${CMAKE_SOURCE_DIR}/tests/headers.cmake)
if(SPILLWAY_CUDA)
  add_test(NAME cuda.program COMMAND ${CMAKE_COMMAND} -DPROGRAM=$<TARGET_FILE:spillway> -P ${CMAKE_CURRENT_LIST_DIR}/cuda_program.cmake)
endif()
