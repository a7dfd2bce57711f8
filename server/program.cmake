find_package(spdlog REQUIRED GLOBAL)
find_package(yaml-cpp REQUIRED GLOBAL)
find_package(CLI11 REQUIRED GLOBAL)
find_package(nlohmann_json REQUIRED GLOBAL)

# The command line as a library, so that tests reach it.
add_library(spillway_program STATIC)
target_sources(
  spillway_program
  PRIVATE await_generation.cc
          bench_report.cc
          command_bench.cc
          command_check.cc
          command_plan.cc
          command_replay.cc
          command_run.cc
          command_serve.cc
          engine_host.cc
          event_pipe.cc
          hardware_file.cc
          load_generator.cc
          log.cc
          machine_memory.cc
          model_path.cc
          modelled_choice.cc
          numa_placement.cc
          option_docs.cc
          option_refusals.cc
          option_rows.cc
          option_table.cc
          option_values.cc
          options.cc
          plan_report.cc
          progress.cc
          replay_report.cc
          watchdog.cc)
target_compile_definitions(spillway_program PRIVATE SPILLWAY_VERSION="${PROJECT_VERSION}")
target_link_libraries(
  spillway_program
  PUBLIC spillway_server
  PRIVATE spillway_grpc fmt::fmt spdlog::spdlog yaml-cpp CLI11::CLI11 nlohmann_json::nlohmann_json)

add_executable(spillway main.cc)
target_link_libraries(spillway PRIVATE spillway_program fmt::fmt)
install(TARGETS spillway RUNTIME DESTINATION bin)

# The built-in demo model, beside the program in the build tree as where it is installed.
install(DIRECTORY ${CMAKE_SOURCE_DIR}/deploy/demo_model DESTINATION share/spillway)
file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/share/spillway)
file(CREATE_LINK ${CMAKE_SOURCE_DIR}/deploy/demo_model ${CMAKE_BINARY_DIR}/share/spillway/demo_model SYMBOLIC)
