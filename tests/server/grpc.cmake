# The gRPC front end and the program: options, watchdog, load generator.
spillway_test(grpc_test SOURCES grpc_test.cc LIBS spillway_grpc spillway_proto)
spillway_test(program_test SOURCES bench_test.cc host_test.cc options_test.cc watchdog_test.cc
              LIBS spillway_program fmt::fmt nlohmann_json::nlohmann_json)
include(${CMAKE_SOURCE_DIR}/tests/e2e/e2e.cmake)
include(${CMAKE_SOURCE_DIR}/tests/headers.cmake)
